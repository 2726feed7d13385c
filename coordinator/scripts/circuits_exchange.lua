-- Take what a worker reports of upstreams, and tell all that is known of those in trouble, in one step.
-- All times are the node's.
-- KEYS[1]   circuits (hash): upstream -> "state at due openings lapse prober failures since"
--             open    at: when it opened; due: when a probe may go; lapse, prober: who has leave to make it, until when
--             closed  at: when it closed; due: until when that is told
--             failing nothing is said of the circuit; failures: so many since `since`. Counted while closed, too
-- ARGV[1]   who reports (no spaces)
-- ARGV[2]   how long the leave to probe is given for, in ms
-- ARGV[3]   window for failures, in ms
-- ARGV[4]   failures of all workers in a window, none of them with a success since, that open a circuit
-- ARGV[5]   for how long it opens then, in ms
-- ARGV[6]   for how long it is told that a circuit has closed, in ms
-- ARGV[7]   how long an open circuit is remembered that nobody probes, in ms
-- ARGV[8]   most upstreams to remember; the others are left to the workers themselves
-- ARGV[9+]  kind, upstream, number, number, ...:
--             opened (for ms, openings) | closed | failed (failures) | succeeded |
--             probe (ms since it opened for the reporter, openings): give me leave, or more time
-- Result    {{upstream, state, ms since then, ms until a probe is due, openings, ms of a probe's leave, 1 if it is
--           the reporter's, failures}, ...}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reporter, leave, window, threshold = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local opening, telling, memory, most = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local circuits, known, changed = {}, 0, {}

-- When a circuit is forgotten.
local function ends(c)
  if c.state == 'open' then
    return math.max(c.due, c.lapse) + memory
  end
  return c.state == 'closed' and c.due or c.since + window
end

local function read(text)
  local state, at, due, openings, lapse, prober, failures, since =
    string.match(text, '^(%a+) (%d+) (%d+) (%d+) (%d+) (%S*) (%d+) (%d+)$')
  if state ~= 'open' and state ~= 'closed' and state ~= 'failing' then
    return nil
  end
  -- After a failover the clock may be behind.
  local c = {
    state = state, at = math.min(tonumber(at), now), due = math.min(tonumber(due), now + memory), prober = prober,
    lapse = math.min(tonumber(lapse), now + leave), openings = math.min(tonumber(openings), 1000),
    failures = math.min(tonumber(failures), threshold), since = math.min(tonumber(since), now),
  }
  return ends(c) > now and c or nil
end

local function put(name, c)
  if not circuits[name] then
    known = known + 1
  end
  circuits[name], changed[name] = c, true
end

local function made(state, ms, openings)
  return {
    state = state, at = now, due = now + ms, prober = '', lapse = 0, openings = openings, failures = 0, since = now,
  }
end

local handlers = {}

function handlers.opened(name, c, ms, openings)
  -- Who did not know that it is open already has nothing to add.
  if not c or c.state ~= 'open' or c.due <= now or c.prober == reporter then
    put(name, made('open', ms, openings))
  end
end

function handlers.closed(name)
  put(name, made('closed', telling, 0))
end

function handlers.failed(name, c, failures)
  if c and c.state == 'open' then
    return
  end
  c = c or made('failing', 0, 0)
  if now - c.since >= window then
    c.failures, c.since = 0, now
  end
  c.failures = c.failures + failures
  put(name, c.failures >= threshold and made('open', opening, 1) or c)
end

function handlers.succeeded(name, c)
  if c and c.failures > 0 then
    c.failures = 0
    changed[name] = true
  end
end

function handlers.probe(name, c, age, openings)
  -- What opened before the closing is closed now, and the reporter is about to hear it.
  if not c or c.state == 'failing' or (c.state == 'closed' and now - c.at >= age) then
    c = made('open', 0, openings)
  end
  if c.state == 'open' and c.due <= now and (c.prober == reporter or c.lapse <= now) then
    c.prober, c.lapse = reporter, now + leave
    put(name, c)
  end
end

local fields = redis.pcall('HGETALL', KEYS[1])
if fields.err then -- something that is no hash, and so none of ours
  redis.call('DEL', KEYS[1])
  fields = {}
end
for i = 1, #fields, 2 do
  local c = read(fields[i + 1])
  if c then
    circuits[fields[i]] = c
    known = known + 1
  else
    changed[fields[i]] = true
  end
end

for i = 9, #ARGV, 4 do
  local name = ARGV[i + 1]
  if circuits[name] or known < most then
    handlers[ARGV[i]](name, circuits[name], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]))
  end
end

if next(changed) then
  local last = now
  for name in pairs(changed) do
    local c = circuits[name]
    if c and (c.state ~= 'failing' or c.failures > 0) then
      redis.call('HSET', KEYS[1], name, string.format('%s %.0f %.0f %.0f %.0f %s %.0f %.0f',
        c.state, c.at, c.due, c.openings, c.lapse, c.prober, c.failures, c.since))
    else
      circuits[name] = nil
      redis.call('HDEL', KEYS[1], name)
    end
  end
  for _, c in pairs(circuits) do
    last = math.max(last, ends(c))
  end
  redis.call('PEXPIRE', KEYS[1], last - now + 1)
end

local result = {}
for name, c in pairs(circuits) do
  result[#result + 1] = {
    name, c.state, now - c.at, math.max(0, c.due - now), c.openings, math.max(0, c.lapse - now),
    c.prober == reporter and 1 or 0, c.failures,
  }
end
return result
