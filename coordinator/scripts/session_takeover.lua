-- Replace the owner of a session by compare-and-set on the registration that the new owner has seen.
-- The epoch is the larger of the old one plus one and the node's time: an INCR would hand the same epoch out twice after a
-- failover to a lagging replica.
-- KEYS[1]  session
-- ARGV[1]  owner that is replaced
-- ARGV[2]  its epoch
-- ARGV[3]  new owner (incarnation)
-- ARGV[4]  lifetime in ms
-- Result   {1, owner, epoch} taken over; {0, owner, epoch} the registration had changed, or is gone ('' and '0')
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] ~= ARGV[1] or current[2] ~= ARGV[2] then
  return {0, current[1] or '', current[2] or '0'}
end
local now = redis.call('TIME')
local epoch = string.format('%.0f', math.max(tonumber(ARGV[2]) + 1, now[1] * 1000 + math.floor(now[2] / 1000)))
redis.call('HSET', KEYS[1], 'owner', ARGV[3], 'epoch', epoch)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, ARGV[3], epoch}
