-- Push envelopes to a worker's mailbox, if it lives, reads this generation, and has room.
-- KEYS[1]  lease of the receiver
-- KEYS[2]  mailbox of the receiver, of the generation in ARGV[1]
-- ARGV[1]  generation
-- ARGV[2]  most envelopes in the mailbox for new requests to be admitted
-- ARGV[3]  lifetime of the mailbox in ms
-- ARGV[4]  how many of the following envelopes hold new requests (they come first)
-- ARGV[5+] envelopes
-- Result   {status, generation}: 0 pushed; 1 owner down; 2 other generation (nothing pushed);
--          3 busy (requests refused, the rest pushed)
local gen = redis.call('HGET', KEYS[1], 'gen')
if not gen then
  return {1, 0}
end
if gen ~= ARGV[1] then
  return {2, tonumber(gen)}
end
local first, status = 5, 0
local requests = tonumber(ARGV[4])
if requests > 0 and redis.call('LLEN', KEYS[2]) >= tonumber(ARGV[2]) then
  first, status = 5 + requests, 3
end
if first <= #ARGV then
  redis.call('RPUSH', KEYS[2], unpack(ARGV, first))
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
return {status, tonumber(gen)}
