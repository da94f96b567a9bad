-- Asks for one of a tenant's places on behalf of a job; where none is free the job waits for its turn.
-- KEYS   1 running, 2 waiting, 3 jobs
-- ARGV   1 job, 2 ttl_s, 3 how long the place lasts in ms, 4 how many places there are (0: any number),
--        5 how many jobs may wait (0: any number; '': the job exists, and is not refused),
--        6 its turn among those that wait, 7 when it was created, 8 how many jobs are listed
-- REPLY  {'ADMITTED'}, also if it has a place already | {'WAITING'} | {'FULL'}: nothing was written
local job, places, may_wait = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local until_ms = tonumber(redis.call('ZSCORE', KEYS[1], job) or 0)
local waiting = redis.call('ZCARD', KEYS[2])
local waits = waiting > 0 and redis.call('ZSCORE', KEYS[2], job)
local is_free = places == 0 or until_ms > now
  or waiting == 0 and redis.call('ZCOUNT', KEYS[1], now, '+inf') < places
if not is_free and not waits and may_wait and may_wait > 0 and waiting >= may_wait then return {'FULL'} end
local function expire()
  return redis.call('EXPIRE', KEYS[1], ARGV[2]) + redis.call('EXPIRE', KEYS[3], ARGV[2]) == 2
end
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on. A new job is refused then.
local is_done = not may_wait and expire()
if is_free then
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), job)
  if waits then redis.call('ZREM', KEYS[2], job) end
elseif not waits then
  redis.call('ZADD', KEYS[2], ARGV[6], job)
end
if waiting > 0 or not is_free then redis.call('EXPIRE', KEYS[2], ARGV[2]) end
redis.call('ZADD', KEYS[3], 'NX', ARGV[7], job)
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - tonumber(ARGV[8]))
if not is_done then expire() end
return {is_free and 'ADMITTED' or 'WAITING'}
