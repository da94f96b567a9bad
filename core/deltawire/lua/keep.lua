-- Keeps what webhooks are told of a job's end, unless it is kept already. At maxmemory, too, where it is changed.
-- KEYS   1 hash
-- ARGV   1 ttl_s, 2 the message's id, then further fields (name, value, ...)
-- REPLY  {1} kept now | {0} it was
if redis.call('HGET', KEYS[1], 'id') == ARGV[2] then return {0} end
redis.call('DEL', KEYS[1]) -- a job of this id that has been forgotten
redis.call('HSET', KEYS[1], 'id', unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {1}
