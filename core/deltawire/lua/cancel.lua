-- Sets the cancel key of a job that has not ended, and tells the worker that runs it.
-- KEYS   1 meta, 2 log, 3 cancel
-- ARGV   1 value of the cancel key, 2 its ttl_s, 3 prefix of the control channels, 4 job id
-- REPLY  {status, top, value of the cancel key}
--        status 'unknown': there is no record; the key is a tombstone that the claim will find
local known = redis.call('HMGET', KEYS[1], 'status', 'owner')
local status = known[1] or 'unknown'
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local top = last and tonumber(string.match(last[1], '^%d+')) or 0
if status == 'unknown' or status == 'queued' or status == 'in_progress' then
  -- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
  redis.call('EXPIRE', KEYS[3], ARGV[2])
  redis.call('SET', KEYS[3], ARGV[1], 'EX', ARGV[2], 'NX')
  if known[2] then
    redis.call('PUBLISH', ARGV[3] .. known[2], ARGV[4] .. '\n' .. redis.call('GET', KEYS[3]))
  end
end
return {status, top, redis.call('GET', KEYS[3]) or ''}
