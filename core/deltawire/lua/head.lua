-- Some of a job's record and the bounds of its log, as of one moment. Writes nothing.
-- KEYS   1 meta, 2 log
-- ARGV   the record's fields that are wanted
-- REPLY  {their values as HMGET, number of the first event (0: empty log; after a snapshot the one that follows
--        it), number of the last (0: empty log), ms until its lease runs out ('' for none)}
local function number(entry)
  return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end
local first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local snapshot = first and string.find(first[2][2], '{"type":"snapshot",', 1, true) == 1
local lease_until = redis.call('HGET', KEYS[1], 'lease_until')
local time = redis.call('TIME')
local left = lease_until and tonumber(lease_until) - time[1] * 1000 - math.floor(time[2] / 1000)
return {redis.call('HMGET', KEYS[1], unpack(ARGV)), number(first) + (snapshot and 1 or 0), number(last), left or ''}
