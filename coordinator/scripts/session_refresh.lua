-- Extend the lifetime of a session that is in use, if the caller still owns it.
-- KEYS[1]  session
-- ARGV[1]  owner
-- ARGV[2]  epoch
-- ARGV[3]  lifetime in ms
-- Result   1 if extended, 0 if the registration is another or gone
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] == ARGV[1] and current[2] == ARGV[2] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 0
