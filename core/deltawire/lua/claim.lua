-- Makes the caller the owner of a job's next attempt, if nobody else has a living claim.
-- KEYS   1 meta, 2 log, 3 cancel
-- ARGV   1 owner, 2 lease in ms, 3 ttl_s,
--        4 attempt that may be taken over, if it is the caller's or its lease has expired ('' for none),
--        5... record fields for a job without a record (none: the job must have one)
-- REPLY  {'CLAIMED', attempt, top, cancel value or '', record as HGETALL}
--        {'MISSING'} | {'HELD', ms left}: another owner's lease is alive
--        {'PARKED', ms left}: the job waits until then, unless it is to be cancelled
--        {'ENDED', status}: its record may be gone
--        {'OWN' or 'EXPIRED', attempt, top, cancel value or '', record as HGETALL}: the attempt is the caller's
--        already, or its lease has run out; the caller decides, then calls again with this attempt
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HMGET', KEYS[1], 'status', 'attempt', 'owner', 'lease_until', 'not_before')
local status = known[1]
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local top = last and tonumber(string.match(last[1], '^%d+')) or 0
local cancel = redis.call('GET', KEYS[3])
cancel = cancel == '' and '1' or cancel or ''
if not status then
  if #ARGV < 5 then return {'MISSING'} end
  local over = string.match(cancel, '^over (.*)')
  if over then return {'ENDED', over} end
  redis.call('HSET', KEYS[1], 'attempt', 0, unpack(ARGV, 5))
  if drop_foreign_tombstone(KEYS[3], redis.call('HGET', KEYS[1], 'tenant')) then cancel = '' end
elseif status == 'in_progress' then
  local own, left = known[3] == ARGV[1], tonumber(known[4]) - now
  if not own and left > 0 then return {'HELD', left} end
  if known[2] ~= ARGV[4] then
    return {own and 'OWN' or 'EXPIRED', tonumber(known[2]), top, cancel, redis.call('HGETALL', KEYS[1])}
  end
elseif status ~= 'queued' then
  return {'ENDED', status}
elseif known[5] and tonumber(known[5]) > now and cancel == '' then
  return {'PARKED', tonumber(known[5]) - now}
end
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
-- Of an attempt that was parked and goes on; one that is taken over is another one.
if status == 'in_progress' then redis.call('HDEL', KEYS[1], 'attempt_began_at') end
redis.call('HDEL', KEYS[1], 'not_before')
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
redis.call('HSET', KEYS[1], 'status', 'in_progress', 'owner', ARGV[1], 'lease_until', now + tonumber(ARGV[2]))
redis.call('HSETNX', KEYS[1], 'started_at', string.format('%.6f', time[1] + time[2] / 1000000))
return {'CLAIMED', attempt, top, cancel, redis.call('HGETALL', KEYS[1])}
