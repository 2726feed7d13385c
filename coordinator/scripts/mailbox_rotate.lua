-- Name a new mailbox generation, so that nobody pushes to the old one any more.
-- KEYS[1]  lease
-- ARGV[1]  new generation
-- Result   1, or 0 when the lease has ended
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], 'gen', ARGV[1])
return 1
