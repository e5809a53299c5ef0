// The page of the chat. The conversation itself is the server's: what is here can be thrown away at any time.

const banner = document.getElementById("banner");
const messages = document.getElementById("messages");
const form = document.getElementById("form");
const text = document.getElementById("text");
const send = document.getElementById("send");

// -- The conversation: its name stands behind the # of the address, so that a reload finds it ------------------------

function show(from, said) {
  const element = document.createElement("p");
  element.className = `message ${from}`;
  element.textContent = said; // as text: whatever it looks like, it never becomes a part of the page
  messages.append(element);
  messages.scrollTop = messages.scrollHeight;
  return element;
}

async function open() {
  let thread = decodeURIComponent(location.hash.slice(1));
  let answer = thread && (await fetch(`/conversations/${encodeURIComponent(thread)}`));
  if (!answer || answer.status === 404) {
    thread = (await (await fetch("/conversations", { method: "POST" })).json()).thread_id;
    history.replaceState(null, "", `#${thread}`);
    return { thread, messages: [], unfinished: false };
  }
  if (!answer.ok) {
    throw new Error((await answer.json()).detail);
  }
  return { thread, ...(await answer.json()) };
}

// The answer comes as lines of JSON, each with a piece of text.
async function read(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    lines.forEach((line) => take(JSON.parse(line)));
  }
}

// Returns what went wrong, if anything did, and whether the question is to be asked again.
async function stream(path, body) {
  send.disabled = true;
  const element = show("agent", "");
  element.setAttribute("aria-busy", "true"); // to be read out when it is whole
  let outcome = { problem: "The answer was cut off. Reload the page to go on.", again: false };
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    await read(response, (line) => {
      if (line.text) element.append(line.text);
      if (line.error) outcome = { problem: line.error, again: true };
      if (line.end) outcome = { problem: "", again: false };
      messages.scrollTop = messages.scrollHeight;
    });
  } catch (error) {
    console.warn(error); // the server went away; the sentence above says what to do
  }
  element.removeAttribute("aria-busy");
  if (outcome.problem) {
    if (!element.textContent) element.remove();
    show("problem", outcome.problem);
  }
  send.disabled = false;
  return outcome;
}

// -- The banner: what the saver tells of this conversation ------------------------------------------------------------

let fading;
let again;

function say(state, sentence, seconds) {
  clearTimeout(fading);
  banner.dataset.state = state;
  banner.textContent = sentence;
  if (seconds) fading = setTimeout(() => say("", ""), seconds * 1000);
}

function take(severity, message, outcome, isNew) {
  const state = banner.dataset.state;
  if (state === "lost") return; // that does not pass
  if (outcome === "lost") say("lost", message);
  else if (severity === "critical") say("degraded", message);
  else if (outcome === "recovered" && severity === "info") {
    // Shown to those who have seen that something was wrong.
    if (state === "degraded") say(isNew ? "recovered" : "", isNew ? message : "", 6);
  } else if (severity === "warning" && isNew && state !== "degraded") say("notice", message, 8);
}

function watch(thread) {
  const path = `/threads/${encodeURIComponent(thread)}`;
  const source = new EventSource(`${path}/events`); // the browser sends the cookie with it, and comes back by itself
  let early = [];
  const act = (event) => take(event.severity, event.message, event.outcome, true);

  // What came before: the log of the thread has the same sentences.
  async function catchUp() {
    early = early || [];
    if (banner.dataset.state === "offline") say("", "");
    const seen = banner.dataset.state === "degraded"; // then its end is news
    try {
      const answer = await fetch(`${path}/logs?limit=50`);
      const { lines = [] } = await answer.json();
      // As they happened: a line that could not be stored at once stands behind later ones.
      lines.sort((one, other) => Date.parse(one.created_at) - Date.parse(other.created_at));
      lines.forEach((line) => take(line.level, line.message, line.context?.outcome, seen));
    } finally {
      early.forEach(act);
      early = null;
    }
    // The line that says that it is over may be on its way.
    clearTimeout(again);
    if (banner.dataset.state === "degraded") again = setTimeout(catchUp, 5000);
  }

  source.onopen = catchUp;
  source.addEventListener("reset", catchUp); // something in between may be missing
  source.onmessage = ({ data }) => (early ? early.push(JSON.parse(data)) : act(JSON.parse(data)));
  source.onerror = () => {
    if (!banner.dataset.state) say("offline", "The connection to the server was lost. Trying again.");
    // A server that answers with a refusal is not asked again by the browser itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(watch, 3000, thread);
  };
}

// -- Begin --------------------------------------------------------------------------------------------------------------

// While neither server can say what was said, there is nothing to show but that.
async function opened() {
  for (;;) {
    try {
      return await open();
    } catch (error) {
      say("offline", `${error.message} Trying again.`);
      await new Promise((later) => setTimeout(later, 3000));
    }
  }
}

const { thread, messages: earlier, unfinished } = await opened();
watch(thread);
earlier.forEach((message) => show(message.from, message.text));
const conversation = `/conversations/${encodeURIComponent(thread)}`;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const said = text.value.trim();
  if (!said || send.disabled) return;
  text.value = "";
  show("you", said);
  const { again } = await stream(`${conversation}/messages`, { text: said });
  if (again) text.value ||= said;
  text.focus();
});

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

document.getElementById("new").addEventListener("click", () => {
  location.href = "/";
});
window.addEventListener("hashchange", () => location.reload());

send.disabled = false;
text.focus();
if (unfinished) await stream(`${conversation}/continue`, {});
