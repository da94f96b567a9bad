-- Extends a running attempt's lease and the life of the job's keys; says whether to cancel.
-- KEYS   1 meta, 2 log, 3 cancel
-- ARGV   1 owner, 2 attempt, 3 lease in ms, 4 ttl_s
-- REPLY  {'OK', cancel value or ''} | {'STALE', ''}: the attempt is no longer the caller's, or the job has ended
--        | {'MISSING', ''}: there is no record
local known = redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'status')
if not known[2] then return {'MISSING', ''} end
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] or known[3] ~= 'in_progress' then return {'STALE', ''} end
local time = redis.call('TIME')
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('HSET', KEYS[1], 'lease_until', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3]))
local cancel = redis.call('GET', KEYS[3])
return {'OK', cancel == '' and '1' or cancel or ''}
