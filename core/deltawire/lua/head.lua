-- A job's record and the bounds of its log, as of one moment. Writes nothing.
-- KEYS   1 meta, 2 log
-- REPLY  {record as HGETALL (empty: none), number of the first event, number of the last} (0: empty log)
local function number(entries)
  return entries[1] and tonumber(string.match(entries[1][1], '^%d+')) or 0
end
return {
  redis.call('HGETALL', KEYS[1]),
  number(redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)),
  number(redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)),
}
