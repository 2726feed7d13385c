-- Give a session up and keep its record: whoever is asked for it next may take it over at once.
-- KEYS[1]  session
-- ARGV[1]  owner
-- ARGV[2]  epoch
-- Result   1 if handed off, 0 if the registration is another or gone
local current = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if current[1] == ARGV[1] and current[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'owner', '')
  return 1
end
return 0
