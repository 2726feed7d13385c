-- Extend the lifetime of a session, if the caller still owns it, and renew its resume record where that has changed.
-- KEYS[1]  session
-- ARGV[1]  owner
-- ARGV[2]  epoch
-- ARGV[3]  lifetime in ms
-- ARGV[4]  resume record, or '' to leave it as it is
-- Result   1 if extended, 0 if the registration is another or gone
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] == ARGV[1] and current[2] == ARGV[2] then
  if ARGV[4] ~= '' then
    redis.call('HSET', KEYS[1], 'resume', ARGV[4])
  end
  return redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 0
