-- Renew a lease that still exists; a lease that ended is never revived.
-- KEYS[1]  lease
-- ARGV[1]  lease in ms
-- Result   {1 if renewed else 0, Redis time in ms}
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
return {redis.call('PEXPIRE', KEYS[1], ARGV[1]), ms}
