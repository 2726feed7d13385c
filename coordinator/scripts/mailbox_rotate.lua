-- Name a new mailbox generation, so that nobody pushes to the old one any more.
-- KEYS[1]  lease
-- ARGV[1]  new generation
-- Result   the generation that was named before (after a failover not always the last one), or 0 when the lease has ended
local before = redis.call('HGET', KEYS[1], 'gen')
if not before then
  return 0
end
redis.call('HSET', KEYS[1], 'gen', ARGV[1])
return tonumber(before)
