-- Says that a worker process lives, if one is named; answers those that were not heard of in time.
-- KEYS   1 owners
-- ARGV   1 owner ('' for none), 2 lease in ms, 3 ttl_s
-- REPLY  {1 if the named owner was not known, else 0; the owners whose lease has run out}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local is_new = 0
if ARGV[1] ~= '' then
  redis.call('EXPIRE', KEYS[1], ARGV[3])
  is_new = redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return {is_new, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)}
