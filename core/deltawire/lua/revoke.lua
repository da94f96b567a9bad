-- Adds a revocation, and drops those that matter no more.
-- KEYS   1 the stream of revocations
-- ARGV   1 the revocation, 2 how long one matters at most, in s, 3 how many there may be
-- REPLY  {1}, or {0}: there are too many
local now = redis.call('TIME')[1]
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%d000', now - ARGV[2]))
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) then
  return {0}
end
redis.call('XADD', KEYS[1], '*', 'r', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {1}
