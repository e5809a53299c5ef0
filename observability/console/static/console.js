// What the pages do better with JavaScript: a link signs in, and what is new is announced and shown as it arrives.
// Without it everything works by loading the page again.
"use strict";

// A link `.../console/#token=TOKEN` signs in. What stands after # is sent to no server and in no Referer; it is taken
// out of the address, and so out of the history, before anything else happens.
(function () {
  const name = "#token=";
  if (!window.location.hash.startsWith(name)) {
    return;
  }
  const given = window.location.hash.slice(name.length);
  window.history.replaceState(null, "", window.location.pathname + window.location.search);
  const field = document.querySelector("#sign-in input[name=token]");
  if (field === null) {
    return;
  }
  field.value = decodeURIComponent(given);
  // A link on another site must not sign anybody in as somebody else unasked.
  if (field.form.dataset.unasked === "yes") {
    field.form.requestSubmit();
  }
})();

// What is asked for again and again is not read aloud each time, but the answer is when it changes.
(function () {
  const news = document.getElementById("news");
  if (news === null) {
    return;
  }
  let last = document.getElementById("verdict").textContent;
  document.body.addEventListener("htmx:afterSettle", function () {
    const verdict = document.getElementById("verdict");
    if (verdict !== null && verdict.textContent !== last) {
      last = verdict.textContent;
      news.textContent = last;
    }
  });
})();

(function () {
  const region = document.getElementById("live");
  if (!region || !window.EventSource) {
    return;
  }
  let count = 0;
  let timer = null;

  function announce() {
    const link = document.createElement("a");
    link.href = region.dataset.here;
    link.textContent = "Show";
    const what = count === 1 ? "1 new error. " : count + " new errors. ";
    region.replaceChildren(document.createTextNode(what), link);
  }

  // Nothing is exchanged under the hands of somebody who is in the list, or on a later page.
  function refresh() {
    timer = null;
    const list = document.getElementById("list");
    if (!window.htmx || region.dataset.first !== "yes" || list.contains(document.activeElement)) {
      return;
    }
    window.htmx.ajax("GET", region.dataset.here, { target: "#list", select: "#list", swap: "outerHTML" });
  }

  function arrived() {
    count += 1;
    announce();
    if (timer === null) {
      timer = window.setTimeout(refresh, 500);
    }
  }

  const source = new EventSource(region.dataset.live);
  source.addEventListener("system_error", arrived);
  source.addEventListener("reset", arrived);
  source.addEventListener("open", function () {
    region.dataset.connected = "yes";
  });
  window.addEventListener("pagehide", function () {
    source.close();
  });
})();
