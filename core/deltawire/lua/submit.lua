-- Creates a job's record and the first event of its log, unless it exists.
-- KEYS   1 meta, 2 log, 3 cancel, 4 channel
-- ARGV   1 ttl_s, 2 digest of the body, 3 event, 4 tenant, 5 PUBLISH or SPUBLISH,
--        6... record fields (name, value, ...)
-- REPLY  {'CREATED'} | {'EXISTS', status, '1' if the digest is the same else '0'}
local known = redis.call('HMGET', KEYS[1], 'status', 'digest')
if known[1] then
  return {'EXISTS', known[1], known[2] == ARGV[2] and '1' or '0'}
end
redis.call('HSET', KEYS[1], 'status', 'queued', 'attempt', 0, 'digest', ARGV[2], unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[1], ARGV[1])
-- Another tenant's tombstone is not for this job, nor is the end of one whose record is gone.
if string.find(redis.call('GET', KEYS[3]) or '', '^over ') then redis.call('DEL', KEYS[3]) end
drop_foreign_tombstone(KEYS[3], ARGV[4])
redis.call('DEL', KEYS[2]) -- of a job whose record is gone
redis.call('XADD', KEYS[2], '1-0', 'e', ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[1])
redis.call(ARGV[5], KEYS[4], ARGV[3])
return {'CREATED'}
