-- Puts a running job back into the queue: for a while, if its upstream has said when to come again, or until it is
-- its turn among its tenant's. The attempt is not counted, since the next claim goes on with it; until the wait is
-- over a claim is answered PARKED.
-- KEYS   1 meta, 2 log, 3 cancel
-- ARGV   1 attempt, 2 owner, 3 wait in ms (0: until its turn), 4 ttl_s, 5 top of the log as its owner knows it,
--        6... record fields (name, value, ...)
-- REPLY  {'PARKED', ''} | {'CANCELLED', cancel value}: refused, end the job
--        | {'STALE', ''}: the attempt is not the caller's any more, or the job has ended
--        | {'MISSING', ''}: there is no record, or events of the log are lost: write them again first
local known = redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'status', 'not_before')
if not known[2] then return {'MISSING', ''} end
-- A repeat, whose answer was lost, changes nothing.
if known[3] == 'queued' and known[4] and known[2] + 1 == tonumber(ARGV[1]) then return {'PARKED', ''} end
if known[1] ~= ARGV[2] or known[2] ~= ARGV[1] or known[3] ~= 'in_progress' then return {'STALE', ''} end
local cancel = redis.call('GET', KEYS[3])
if cancel then return {'CANCELLED', cancel == '' and '1' or cancel} end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if (last and tonumber(string.match(last[1], '^%d+')) or 0) < tonumber(ARGV[5]) then return {'MISSING', ''} end
local time = redis.call('TIME')
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('HINCRBY', KEYS[1], 'attempt', -1)
redis.call('HDEL', KEYS[1], 'owner', 'lease_until', 'admitted')
redis.call('HSET', KEYS[1], 'status', 'queued', unpack(ARGV, 6))
-- One that waits for its first turn has not been started.
if ARGV[3] == '0' and not redis.call('HGET', KEYS[1], 'attempt_began_at') then
  redis.call('HDEL', KEYS[1], 'started_at')
end
redis.call('HSET', KEYS[1], 'not_before', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3]))
return {'PARKED', ''}
