-- Delete a registration, if it is still the one the caller holds.
-- KEYS[1]  session
-- ARGV[1]  owner
-- ARGV[2]  epoch
-- Result   1 if deleted, 0 if the registration is another or gone
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] == ARGV[1] and current[2] == ARGV[2] then
  return redis.call('DEL', KEYS[1])
end
return 0
