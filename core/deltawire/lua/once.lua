-- Says yes to one caller in a while. At maxmemory, too.
-- KEYS   1 a key that is there meanwhile
-- ARGV   1 how long, in s
-- REPLY  {1} yes | {0} somebody was told so before
if redis.call('EXISTS', KEYS[1]) == 1 then return {0} end
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
return {1}
