-- Adds to a set across jobs. At maxmemory, too: jobs must be taken and end for memory to become free.
-- KEYS   1 set
-- ARGV   1 ttl_s, 2... members
-- REPLY  {}
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[1])
for i = 2, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {}
