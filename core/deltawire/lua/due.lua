-- Takes what is due out of a set by times, for a while: nobody else gets it meanwhile. At maxmemory, too.
-- KEYS   1 set, by Unix time
-- ARGV   1 for how long, in s, 2 how many, 3 ttl_s
-- REPLY  {how many there are, due or not; those that are due}
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[3])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[2])
for _, name in ipairs(due) do redis.call('ZADD', KEYS[1], now + ARGV[1], name) end
return {redis.call('ZCARD', KEYS[1]), due}
