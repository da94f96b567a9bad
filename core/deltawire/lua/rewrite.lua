-- Puts what its owner holds in the place of a job's log, and of its record: Redis has lost them, or the log
-- has grown long. Publishes the events that the log did not have.
-- KEYS   1 meta, 2 log, 3 cancel, 4 channel
-- ARGV   1 attempt, 2 owner, 3 ttl_s, 4 lease in ms, 5 PUBLISH or SPUBLISH, 6 number of the first event,
--        7 snapshot of what comes before it ('' where that is nothing),
--        8 how many of the following are record fields (name, value, ...), then those, then the events
-- REPLY  {'OK' or 'CANCELLING', top, receivers} | {'STALE' or 'ENDED', top, 0}, as append.lua
local known = redis.call('HMGET', KEYS[1], 'attempt', 'owner', 'status')
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local top = last and tonumber(string.match(last[1], '^%d+')) or 0
local first, fields_end = tonumber(ARGV[6]), 8 + tonumber(ARGV[8])
local through = first + #ARGV - fields_end - 1
if known[1] and (known[1] ~= ARGV[1] or known[2] ~= ARGV[2]) then return {'STALE', top, 0} end
if known[1] and known[3] ~= 'in_progress' then return {'ENDED', top, 0} end
if not known[1] and string.find(redis.call('GET', KEYS[3]) or '', '^over ') then return {'ENDED', top, 0} end
if top > through then return {'STALE', top, 0} end

-- DEL comes first: at maxmemory a script that has begun to write may go on.
redis.call('DEL', KEYS[2])
if not known[1] then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'status', 'in_progress', 'attempt', ARGV[1], 'owner', ARGV[2],
    'lease_until', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[4]))
end
-- Also of a record that is there: it may not know yet that there are deltas.
redis.call('HSET', KEYS[1], unpack(ARGV, 9, fields_end))
if ARGV[7] ~= '' then redis.call('XADD', KEYS[2], string.format('%d-0', first - 1), 'e', ARGV[7]) end
for i = fields_end + 1, #ARGV do
  redis.call('XADD', KEYS[2], string.format('%d-0', first + i - fields_end - 1), 'e', ARGV[i])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
if not known[1] then drop_foreign_tombstone(KEYS[3], redis.call('HGET', KEYS[1], 'tenant')) end
local receivers = 0
local begin = fields_end + 1 + math.max(0, top + 1 - first)
if begin <= #ARGV then receivers = redis.call(ARGV[5], KEYS[4], table.concat(ARGV, '\n', begin)) end
return {redis.call('EXISTS', KEYS[3]) == 1 and 'CANCELLING' or 'OK', through, receivers}
