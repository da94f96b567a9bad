-- Adds a job to those that wait, unless it is among them. At maxmemory, too: a job that runs may have to wait again.
-- KEYS   1 set, by deadline
-- ARGV   1 ttl_s, 2 deadline, 3 job
-- REPLY  {}
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], 'NX', ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {}
