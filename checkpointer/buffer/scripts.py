"""The Lua scripts that change and read a thread's keys, each one atomic step.

Not here: how a call is built and its reply read (`commands.py`). The keys are those of `keys.py`, in the order
of `ThreadKeys`. Needs Redis 7.0 or Valkey: core commands only. `read` needs no memory, `drain`,
`ack`, `drop` and `close` free some: they run also when memory is full.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

_NAMES = """
local STATE, THREADS, DIRTY, ORDER, WRITES, CLEAN, FACTS =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local call = redis.call
local NUL = string.char(0)
"""

# The partition's count of dirty bytes is kept beside each change of a dirty record.
_DROP_DIRTY = """
local bytes = 0
local function drop_dirty(name)
  bytes = bytes - call('HSTRLEN', DIRTY, name)
  call('HDEL', DIRTY, name)
end
"""

# Each call from Lua costs about as much as all of a script's own work, so fields are read and written together; by
# the thousand, since a Lua function takes some 8,000 arguments at most.
_TOGETHER = """
local function get_all(key, names)
  if #names > 0 and #names <= 1000 then return call('HMGET', key, unpack(names)) end
  local found = {}
  for i = 1, #names, 1000 do
    local some = call('HMGET', key, unpack(names, i, math.min(i + 999, #names)))
    for j = 1, #some do found[i + j - 1] = some[j] end
  end
  return found
end
local function do_all(command, key, args)
  if #args > 0 and #args <= 1000 then return call(command, key, unpack(args)) end
  for i = 1, #args, 1000 do call(command, key, unpack(args, i, math.min(i + 999, #args))) end
end
"""

# Lua's < compares by the server's locale, so ids are compared byte by byte.
_NOT_OLDER = """
local function not_older(a, b)
  local n = math.min(#a, #b)
  for i = 1, n do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return #a >= #b
end
"""

# A checkpoint's payload begins with its parent's id and the names of the blobs it needs (records.py).
_REFS = """
local function refs_of(payload)
  local refs = {}
  -- A damaged payload must not fail the script: whoever reads it says so.
  pcall(function()
    local parent, at = struct.unpack('>I4c0', payload)
    local packed = struct.unpack('>I4c0', payload, at)
    local i = 1
    while i <= #packed do
      local ref
      ref, i = struct.unpack('>I4c0', packed, i)
      refs[#refs + 1] = ref
    end
  end)
  return refs
end
local function held(name)
  return call('HGET', DIRTY, name) or call('HGET', CLEAN, name)
end
"""

# What both kinds of put check before they change anything. A put is refused
# - with 'closed' if Postgres has not been told that the thread has records in the buffer;
# - with 'lost' if the buffer has forgotten records of the thread that the caller knows of;
# - with 'late' if it continues a deleted life of the thread.
# The caller's arguments: `open`, a token under which the thread was opened now, or ''; `expected`, the thread's last
# sequence number as far as the caller knows; `floor`, the partition's; `origin`, the field of the checkpoint that
# is continued, or ''; `own` and `field`, the id to note as refused too and its field, or '' (one that is there already
# is put again); `force`, 1 if the caller knows it is not late.
_CHECK = """
local function refused(facts, open, expected, origin, own, field, force)
  local marker, last, deleted = facts[1], facts[2], facts[3]
  if open == '' then
    if not marker then return {'closed'} end
  elseif not marker or tonumber(open) > tonumber(marker) then
    call('HSET', FACTS, 'open', open)
    facts[1] = open
  end
  last = tonumber(last or 0)
  if last < tonumber(expected) then return {'lost', last} end
  if deleted and origin ~= '' and force == '0' and not (own ~= '' and held(field)) then
    local id = string.sub(origin, string.find(origin, NUL, 3, true) + 1)
    if (not_older(deleted, id) and not held(origin)) or call('HEXISTS', FACTS, 'x' .. NUL .. id) == 1 then
      if own ~= '' then call('HSET', FACTS, 'x' .. NUL .. own, '1') end
      return {'late'}
    end
  end
end
local function take_numbers(n, floor)
  local last = call('HINCRBY', STATE, 'sequence', n)
  if last - n < tonumber(floor) then
    -- Somebody knows a higher number: this server has gone back in time. Numbers are not used twice.
    last = tonumber(floor) + n
    call('HSET', STATE, 'sequence', last, 'replay', floor)
  end
  return last
end
-- Returns the partition's dirty bytes, and for how long (ms) its oldest thread has been dirty.
local function mark_dirty(thread, bytes)
  local now = call('TIME')
  now = now[1] * 1000 + math.floor(now[2] / 1000)
  if call('ZADD', THREADS, 'NX', now, thread) == 1 then
    -- Only a thread with nothing dirty may expire.
    call('PERSIST', WRITES)
    call('PERSIST', FACTS)
  end
  local first = call('ZRANGE', THREADS, 0, 0, 'WITHSCORES')
  return call('HINCRBY', STATE, 'bytes', bytes), first[2] ~= 'inf' and now - tonumber(first[2]) or 0
end
"""

# A pinned thread (flush/poison.py) has the score +inf: it stays known, but counts neither as old nor as due.
_UNPIN = """
local function unpin(thread)
  if call('ZSCORE', THREADS, thread) == 'inf' then
    local now = call('TIME')
    call('ZADD', THREADS, now[1] * 1000 + math.floor(now[2] / 1000), thread)
  end
end
"""


@dataclass(frozen=True)
class Script:
    """A script and the hash by which the server knows it."""

    name: str
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest())


# ARGV: thread, open, expected, floor, origin, force, namespace, checkpoint id, ttl ms, known, number of blobs,
# payload, then name and payload of each blob; `known` is '' or the packed list of all namespaces and heads that
# Postgres has for the thread. Reply: refused (see above), or sequence, open token, dirty bytes and age (ms) of the
# partition, then, if this is the namespace's head now, the positions (from 1) of the needed blobs that Redis lacks.
PUT = Script(
    "put",
    "#!lua\n"
    + _NAMES
    + _TOGETHER
    + _NOT_OLDER
    + _REFS
    + _CHECK
    + """
local thread, ns, id, ttl, known, blobs, payload =
  ARGV[1], ARGV[7], ARGV[8], ARGV[9], ARGV[10], tonumber(ARGV[11]), ARGV[12]
local hfield = 'h' .. NUL .. ns
local facts = call('HMGET', FACTS, 'open', 'last', 'deleted', hfield)
local cprefix = 'c' .. NUL .. ns .. NUL
local bprefix = 'b' .. NUL .. ns .. NUL
local cfield = cprefix .. id
local refusal = refused(facts, ARGV[2], ARGV[3], ARGV[5], id, cfield, ARGV[6])
if refusal then return refusal end
local names, brought = {cfield}, {}
for i = 13, 12 + 2 * blobs, 2 do
  names[#names + 1] = bprefix .. ARGV[i]
  brought[ARGV[i]] = true
end
local dirty, clean = get_all(DIRTY, names), get_all(CLEAN, names)
local previous = dirty[1] or clean[1]
if previous then
  -- Put again: the parent stays (as in the table, where the upsert leaves it alone).
  local sound, parent = pcall(struct.unpack, '>I4c0', previous)
  if sound then
    local _, at = struct.unpack('>I4c0', payload)
    payload = struct.pack('>I4', #parent) .. parent .. string.sub(payload, at)
  end
end
local last = take_numbers(blobs + 1, ARGV[4])
local records, order = {cfield, payload}, {last, cfield}
local bytes = #payload - #(dirty[1] or '')
for i = 1, blobs do
  local name = names[i + 1]
  if not dirty[i + 1] then
    -- The first value of a version wins, as in the table.
    local value = clean[i + 1] or ARGV[12 + 2 * i]
    bytes = bytes + #value
    records[#records + 1] = name
    records[#records + 1] = value
    order[#order + 1] = last - blobs - 1 + i
    order[#order + 1] = name
  end
end
do_all('HSET', DIRTY, records)
do_all('ZADD', ORDER, order)
local held_bytes, age = mark_dirty(thread, bytes)
local head = facts[4]
if known ~= '' and call('HSETNX', FACTS, 'all', '1') == 1 then
  local i = 1
  while i <= #known do
    local name, latest
    name, i = struct.unpack('>I4c0', known, i)
    latest, i = struct.unpack('>I4c0', known, i)
    if latest ~= '' then call('HSETNX', FACTS, 'h' .. NUL .. name, latest) end
  end
  head = call('HGET', FACTS, hfield)
end
local reply = {last, tonumber(facts[1]), held_bytes, age}
if head and not not_older(id, head) then
  call('HSET', FACTS, 'last', last)
  return reply
end
call('HSET', FACTS, 'last', last, hfield, id)
local refs = refs_of(payload)
if call('PEXPIRE', CLEAN, ttl) == 1 and head and head ~= id then
  -- The head moved: what only the old one needed leaves the read cache.
  local needed, leaving = {}, {cprefix .. head}
  for _, ref in ipairs(refs) do needed[ref] = true end
  local old = held(cprefix .. head)
  if old then
    for _, ref in ipairs(refs_of(old)) do
      if not needed[ref] then leaving[#leaving + 1] = bprefix .. ref end
    end
  end
  do_all('HDEL', CLEAN, leaving)
  local wprefix = 'w' .. NUL .. ns .. NUL .. head
  for _, name in ipairs(call('ZRANGEBYLEX', WRITES, '[' .. wprefix .. NUL, '(' .. wprefix .. string.char(1))) do
    if call('HDEL', CLEAN, name) == 1 and call('HEXISTS', DIRTY, name) == 0 then
      call('ZREM', WRITES, name)
    end
  end
end
for i, ref in ipairs(refs) do
  local name = bprefix .. ref
  if not brought[ref] and call('HEXISTS', DIRTY, name) == 0 and call('HEXISTS', CLEAN, name) == 0 then
    reply[#reply + 1] = i
  end
end
return reply
""",
)

# ARGV: namespace, checkpoint id, ttl ms, then name and payload of each blob. Reply: 1 if taken.
# Completes a head that was put while Redis did not hold the channels that had not changed.
FILL = Script(
    "fill",
    "#!lua\n"
    + _NAMES
    + """
if call('HGET', FACTS, 'h' .. NUL .. ARGV[1]) ~= ARGV[2] then return 0 end
for i = 4, #ARGV, 2 do
  local name = 'b' .. NUL .. ARGV[1] .. NUL .. ARGV[i]
  if call('HEXISTS', DIRTY, name) == 0 then call('HSETNX', CLEAN, name, ARGV[i + 1]) end
end
call('PEXPIRE', CLEAN, ARGV[3])
return 1
""",
)

# ARGV: thread, open, expected, floor, origin, force, 1 to overwrite or 0 to let the first one win, then field and
# payload of each write. Reply: refused (see above), or sequence, open token, dirty bytes and age (ms) of the
# partition.
WRITES = Script(
    "put_writes",
    "#!lua\n"
    + _NAMES
    + _TOGETHER
    + _NOT_OLDER
    + _REFS
    + _CHECK
    + """
local facts = call('HMGET', FACTS, 'open', 'last', 'deleted')
local refusal = refused(facts, ARGV[2], ARGV[3], ARGV[5], '', '', ARGV[6])
if refusal then return refusal end
local overwrite = ARGV[7] == '1'
local n = (#ARGV - 7) / 2
local last = take_numbers(n, ARGV[4])
local records, order, members, replaced, bytes = {}, {}, {}, {}, 0
for i = 1, n do
  local name, value = ARGV[6 + 2 * i], ARGV[7 + 2 * i]
  local dirty, clean = call('HSTRLEN', DIRTY, name), call('HSTRLEN', CLEAN, name)
  if overwrite or (dirty == 0 and clean == 0) then
    bytes = bytes + #value - dirty
    records[#records + 1] = name
    records[#records + 1] = value
    order[#order + 1] = last - n + i
    order[#order + 1] = name
    members[#members + 1] = 0
    members[#members + 1] = name
    if clean > 0 then replaced[#replaced + 1] = name end
  end
end
do_all('HSET', DIRTY, records)
do_all('ZADD', ORDER, order)
do_all('ZADD', WRITES, members)
do_all('HDEL', CLEAN, replaced)
call('HSET', FACTS, 'last', last)
return {last, tonumber(facts[1]), mark_dirty(ARGV[1], bytes)}
""",
)

# ARGV: namespace, checkpoint id or '' for the latest, 1 to get everything that Postgres may lack.
# Reply: sequence, the thread's last sequence number, up to which number records are from before a rollback, its open
# token or '', all namespaces known (0/1), head id or '', payload or nil, payload is dirty (0/1), complete (0/1),
# [ref, payload, ...] of the blobs, [field, payload, dirty (0/1), ...] of the writes.
READ = Script(
    "read",
    "#!lua flags=no-writes,allow-oom\n"
    + _NAMES
    + _TOGETHER
    + _REFS
    + """
-- Returns the values, and for each 1 if it is dirty, or 0.
local function all_held(names)
  local values, dirty, clean = get_all(DIRTY, names), {}, nil
  for i = 1, #names do
    dirty[i] = values[i] and 1 or 0
    if not values[i] then
      clean = clean or get_all(CLEAN, names)
      values[i] = clean[i]
    end
  end
  return values, dirty
end
local ns, id, full = ARGV[1], ARGV[2], ARGV[3] == '1'
local facts = call('HMGET', FACTS, 'h' .. NUL .. ns, 'all', 'last', 'open')
local head, all = facts[1] or '', facts[2] and 1 or 0
local latest = id == ''
if latest then id = head end
local payload, dirty = false, 0
if id ~= '' then
  local name = 'c' .. NUL .. ns .. NUL .. id
  payload = call('HGET', DIRTY, name)
  if payload then dirty = 1 else payload = call('HGET', CLEAN, name) end
end
local complete = 0
local blobs = {}
if payload then
  complete = 1
  local refs, names = refs_of(payload), {}
  for i, ref in ipairs(refs) do names[i] = 'b' .. NUL .. ns .. NUL .. ref end
  local values = all_held(names)
  for i, ref in ipairs(refs) do
    if values[i] then
      blobs[#blobs + 1] = ref
      blobs[#blobs + 1] = values[i]
    else
      complete = 0
    end
  end
end
local from, to = 'w' .. NUL .. ns .. NUL .. id, 'w' .. NUL .. ns .. string.char(1)
if not latest or (complete == 1 and not full) then
  from, to = from .. NUL, from .. string.char(1)
end
local writes = {}
if id ~= '' or full or all == 0 then
  local names = call('ZRANGEBYLEX', WRITES, '[' .. from, '(' .. to)
  local values, changed = all_held(names)
  for i, name in ipairs(names) do
    if values[i] then
      writes[#writes + 1] = name
      writes[#writes + 1] = values[i]
      writes[#writes + 1] = changed[i]
    end
  end
end
local state = call('HMGET', STATE, 'sequence', 'replay')
return {
  tonumber(state[1] or 0), tonumber(facts[3] or 0), tonumber(state[2] or 0),
  facts[4] or '', all, head, payload, dirty, complete, blobs, writes
}
""",
)

# ARGV: most records, most bytes. Reply: records that wait, the partition's sequence, up to which number records are
# from before a rollback, up to which number Postgres has the thread's records, its open token or -1, the time (ms),
# then field, sequence number and payload of the first ones, in order.
DRAIN = Script(
    "drain",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + """
local names = call('ZRANGE', ORDER, 0, ARGV[1] - 1, 'WITHSCORES')
local state = call('HMGET', STATE, 'sequence', 'replay')
local now = call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local since = tonumber(call('ZSCORE', THREADS, ARGV[3]) or 'inf')
local reply = {
  call('ZCARD', ORDER), tonumber(state[1] or 0), tonumber(state[2] or 0),
  tonumber(call('HGET', FACTS, 'acked') or 0), tonumber(call('HGET', FACTS, 'open') or -1),
  now, since < math.huge and math.max(0, now - since) or -1
}
local bytes = 0
for i = 1, #names, 2 do
  local value = call('HGET', DIRTY, names[i])
  reply[#reply + 1] = names[i]
  reply[#reply + 1] = tonumber(names[i + 1])
  reply[#reply + 1] = value
  bytes = bytes + #(value or '')
  if bytes >= tonumber(ARGV[2]) then break end
end
return reply
""",
)

# ARGV: thread, sequence, ttl ms, the partition's sequence and the time (ms) at the drain. Forgets the records up to
# the sequence, which are in Postgres now; what belongs to a namespace's head (or to one that is still to come) goes
# to the read cache. Reply: records that wait, or -1 if the server has gone back in time since the drain, so that
# the numbers mean other records now.
ACK = Script(
    "ack",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + _TOGETHER
    + _NOT_OLDER
    + _REFS
    + _UNPIN
    + """
if tonumber(call('HGET', STATE, 'sequence') or 0) < tonumber(ARGV[4]) then return -1 end
local heads, needed = {}, {}
local function head_of(ns)
  if heads[ns] == nil then
    heads[ns] = call('HGET', FACTS, 'h' .. NUL .. ns)
    needed[ns] = {}
    local payload = heads[ns] and held('c' .. NUL .. ns .. NUL .. heads[ns])
    if payload then
      for _, ref in ipairs(refs_of(payload)) do needed[ns][ref] = true end
    end
  end
  return heads[ns]
end
local names = call('ZRANGEBYSCORE', ORDER, '-inf', ARGV[2])
local kept, writes, bytes, found = {}, {}, 0, 0
for _, name in ipairs(names) do
  local size = call('HSTRLEN', DIRTY, name)
  bytes = bytes + size
  if size > 0 then found = found + 1 end  -- no payload is empty
  local kind = string.sub(name, 1, 1)
  local stop = string.find(name, NUL, 3, true)
  local ns = string.sub(name, 3, stop - 1)
  local rest = string.sub(name, stop + 1)
  local head = head_of(ns)
  local keep
  if kind == 'c' then
    keep = head == rest
  elseif kind == 'b' then
    keep = needed[ns][rest]
  else
    local id = string.sub(rest, 1, string.find(rest, NUL, 1, true) - 1)
    keep = not head or id == head or not_older(id, head)
    if not keep then writes[#writes + 1] = name end
  end
  if keep and size > 0 then kept[#kept + 1] = name end
end
do_all('ZREM', WRITES, writes)
local is_all = found == call('HLEN', DIRTY)
if is_all and found > 0 and #kept == found and call('EXISTS', CLEAN) == 0 then
  call('RENAME', DIRTY, CLEAN)  -- all of it is the read cache now
else
  for _, name in ipairs(kept) do call('HSET', CLEAN, name, call('HGET', DIRTY, name)) end
  if is_all then call('DEL', DIRTY) else do_all('HDEL', DIRTY, names) end
end
call('ZREMRANGEBYSCORE', ORDER, '-inf', ARGV[2])
if bytes > 0 then call('HINCRBY', STATE, 'bytes', -bytes) end
call('HSET', FACTS, 'acked', ARGV[2])
local left = call('ZCARD', ORDER)
if left > 0 then
  call('PEXPIRE', CLEAN, ARGV[3])
  -- What is left came after the drain, unless the drain was cut short (then the time given is 0).
  if ARGV[5] ~= '0' then call('ZADD', THREADS, 'XX', ARGV[5], ARGV[1]) end
  unpin(ARGV[1])
else
  call('ZREM', THREADS, ARGV[1])
  -- Opened while Postgres could not be told; the next put has to tell it.
  if call('HGET', FACTS, 'open') == '0' then call('HDEL', FACTS, 'open') end
  -- The facts go first: without them nothing is taken for complete.
  call('PEXPIRE', FACTS, ARGV[3])
  call('PEXPIRE', CLEAN, ARGV[3] + 1000)
  call('PEXPIRE', WRITES, ARGV[3] + 1000)
end
return left
""",
)

# ARGV: thread, sequence, ttl ms, latest id of the deleted life or ''. Drops the records up to the sequence and the
# whole read cache; with 0, only the cache. What came later stays, with the heads worked out anew. Reply: records
# that wait.
DROP = Script(
    "drop",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + _NOT_OLDER
    + _DROP_DIRTY
    + _UNPIN
    + """
for _, name in ipairs(call('ZRANGEBYSCORE', ORDER, '-inf', ARGV[2])) do
  drop_dirty(name)
  call('ZREM', WRITES, name)
end
call('ZREMRANGEBYSCORE', ORDER, '-inf', ARGV[2])
call('HINCRBY', STATE, 'bytes', bytes)
call('DEL', CLEAN)
for _, fact in ipairs(call('HKEYS', FACTS)) do
  if fact == 'all' or string.sub(fact, 1, 2) == 'h' .. NUL then call('HDEL', FACTS, fact) end
end
if ARGV[4] ~= '' then
  local deleted = call('HGET', FACTS, 'deleted')
  if not deleted or not_older(ARGV[4], deleted) then call('HSET', FACTS, 'deleted', ARGV[4]) end
end
if tonumber(ARGV[2]) > tonumber(call('HGET', FACTS, 'acked') or 0) then call('HSET', FACTS, 'acked', ARGV[2]) end
local left = call('ZRANGE', ORDER, 0, -1)
if #left == 0 then
  call('DEL', DIRTY, ORDER, WRITES)
  call('ZREM', THREADS, ARGV[1])
  call('PEXPIRE', FACTS, ARGV[3])
  return 0
end
if ARGV[2] ~= '0' then unpin(ARGV[1]) end
for _, name in ipairs(call('ZRANGE', WRITES, 0, -1)) do
  if call('HEXISTS', DIRTY, name) == 0 then call('ZREM', WRITES, name) end
end
for _, name in ipairs(left) do
  if string.sub(name, 1, 1) == 'c' then
    local stop = string.find(name, NUL, 3, true)
    local hfield = 'h' .. NUL .. string.sub(name, 3, stop - 1)
    local id = string.sub(name, stop + 1)
    local head = call('HGET', FACTS, hfield)
    if not head or not_older(id, head) then call('HSET', FACTS, hfield, id) end
  end
end
return #left
""",
)

# ARGV: token. Forgets that the thread is open if it has nothing dirty and was not opened anew since. Reply: 1 if so.
CLOSE = Script(
    "close",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + """
local marker = call('HGET', FACTS, 'open')
if call('ZCARD', ORDER) > 0 or (marker and tonumber(marker) > tonumber(ARGV[1])) then return 0 end
call('HDEL', FACTS, 'open')
return 1
""",
)

# ARGV: the least that the partition's sequence has to be. Numbers up to it were used before this server went back.
RAISE = Script(
    "raise",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + """
if tonumber(call('HGET', STATE, 'sequence') or 0) < tonumber(ARGV[1]) then
  call('HSET', STATE, 'sequence', ARGV[1], 'replay', ARGV[1])
end
return 1
""",
)

# ARGV: thread. Marks it as pinned, if it has dirty records. Reply: 1.
PIN = Script(
    "pin",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + """
if call('ZCARD', ORDER) > 0 then call('ZADD', THREADS, '+inf', ARGV[1]) end
return 1
""",
)

# ARGV: field, sequence. Drops one dirty record, unless it was put again since. The caller drops the read cache, so that
# the heads are worked out anew. Reply: 1 if it was there.
DISCARD = Script(
    "discard",
    "#!lua flags=allow-oom\n"
    + _NAMES
    + _DROP_DIRTY
    + """
if tonumber(call('ZSCORE', ORDER, ARGV[1]) or -1) ~= tonumber(ARGV[2]) then return 0 end
drop_dirty(ARGV[1])
call('HINCRBY', STATE, 'bytes', bytes)
call('ZREM', WRITES, ARGV[1])
return call('ZREM', ORDER, ARGV[1])
""",
)

# KEYS: a partition's state and its set of dirty threads, and a key that never exists: with it this script is refused,
# as the others are, while a cluster moves the slot. Reply: how long the oldest record has waited, in ms, -1 without
# one; the bytes that are dirty.
SCAN = Script(
    "scan",
    """#!lua flags=no-writes,allow-oom
local bytes = tonumber(redis.call('HGET', KEYS[1], 'bytes') or 0)
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if #first == 0 then return {-1, bytes} end
local now = redis.call('TIME')
-- Pinned threads have the score +inf: one that is alone there waits for nothing.
return {math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(first[2])), bytes}
""",
)
