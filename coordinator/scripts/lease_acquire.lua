-- Start the lease of a new incarnation.
-- KEYS[1]  lease
-- ARGV[1]  lease in ms
-- ARGV[2]  mailbox generation
-- ARGV[3]  info (JSON)
-- Result   {1 if acquired else 0, Redis time in ms}
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {0, ms}
end
redis.call('HSET', KEYS[1], 'gen', ARGV[2], 'info', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {1, ms}
