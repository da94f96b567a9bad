-- Puts entries into a set by times. At maxmemory, too: a job that runs may have to wait again.
-- KEYS   1 set, by Unix time
-- ARGV   1 ttl_s, 2 time, 3 NX: those that are there stay where they are; CH: they are moved, XX: they only; then the entries
-- REPLY  {}
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[1])
for i = 4, #ARGV do redis.call('ZADD', KEYS[1], ARGV[3], ARGV[2], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {}
