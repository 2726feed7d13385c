-- Register a session that has no registration.
-- KEYS[1]  session
-- ARGV[1]  owner (incarnation)
-- ARGV[2]  least epoch
-- ARGV[3]  lifetime in ms
-- ARGV[4+] field, value, ... of the record
-- Result   {1, owner, epoch} claimed; {0, owner, epoch} somebody else's registration stands. The epoch is a string.
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] then
  return {0, current[1], current[2]}
end
local now = redis.call('TIME')
local epoch = string.format('%.0f', math.max(tonumber(ARGV[2]), now[1] * 1000 + math.floor(now[2] / 1000)))
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'epoch', epoch, unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {1, ARGV[1], epoch}
