-- Notes how often a webhook was called, where what it is told is still kept. At maxmemory, too.
-- KEYS   1 hash
-- ARGV   1 ttl_s, 2 webhook's field, 3 how often, 4 a field that is needed no more ('' for none)
-- REPLY  {}
if redis.call('EXPIRE', KEYS[1], ARGV[1]) == 1 then
  redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
  if ARGV[4] ~= '' then redis.call('HDEL', KEYS[1], ARGV[4]) end
end
return {}
