-- Appends numbered events to a job's log and publishes those that are new. A repeat changes nothing.
-- KEYS   1 meta, 2 log, 3 cancel, 4 channel
-- ARGV   1 attempt, 2 owner ('' for a queued job), 3 number of the first event, 4 ttl_s,
--        5 terminal status among the events ('' for none), 6 PUBLISH or SPUBLISH,
--        7 how many of the following are record fields (name, value, ...), then those, then the events
-- REPLY  {code, top, receivers}, where code is
--        OK         the log holds all of them
--        CANCELLING as OK, and the cancel key exists: end the job
--        CANCELLED  refused: the cancel key exists, so `cancelled` is the only terminal event accepted
--        STALE      refused: another attempt owns the job
--        ENDED      refused: the log has its terminal event
--        GAP        refused: events between top and the first one are missing; top is -1 where somebody has deleted
--                   them, so that the log can be written anew only
--        MISSING    refused: there is no record
local known = redis.call('HMGET', KEYS[1], 'attempt', 'owner', 'status')
-- Attempts count from 1 again in a record that was lost and made anew, and one that is parked is not counted: so
-- the owner counts, too, and a queued job has none.
local is_own = known[1] == ARGV[1] and (known[2] or '') == ARGV[2]
local cancelling = redis.call('EXISTS', KEYS[3]) == 1
local first, ttl, terminal = tonumber(ARGV[3]), ARGV[4], ARGV[5]
local fields_end = 7 + tonumber(ARGV[7])
local top, through = first - 1, first + #ARGV - fields_end - 1
local function add(number, event)
  return type(redis.pcall('XADD', KEYS[2], string.format('%d-0', number), 'e', event)) == 'string'
end

-- What follows the top of a log that begins with event 1 is added at once: the log's length says that nothing is
-- missing, XADD refuses what is there already, and the keys live as long as the lease is renewed. All else goes the
-- long way, and so does what a full Redis refuses.
local is_added = is_own and known[3] == 'in_progress' and terminal == '' and top > 0
  and redis.call('XLEN', KEYS[2]) == top and add(first, ARGV[fields_end + 1])
if not is_added then
  local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  top = last and tonumber(string.match(last[1], '^%d+')) or 0
  if not known[1] then return {'MISSING', top, 0} end
  if not is_own then return {'STALE', top, 0} end
  if through <= top then return {'OK', top, 0} end
  if known[3] ~= 'in_progress' and known[3] ~= 'queued' then return {'ENDED', top, 0} end
  if first > top + 1 then return {'GAP', top, 0} end
  if cancelling and terminal ~= '' and terminal ~= 'cancelled' then return {'CANCELLED', top, 0} end

  -- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
  redis.call('EXPIRE', KEYS[1], ttl)
  redis.call('EXPIRE', KEYS[2], ttl)
  if not add(top + 1, ARGV[fields_end + 2 + top - first]) then return {'GAP', -1, 0} end
end
if fields_end > 7 then redis.call('HSET', KEYS[1], unpack(ARGV, 8, fields_end)) end
if terminal ~= '' then
  redis.call('HSET', KEYS[1], 'status', terminal)
  redis.call('HDEL', KEYS[1], 'request', 'message', 'lease_until')
  -- An owner that wakes late, or a message that comes again, must not bring back a job that is gone.
  local mark_s = 3600
  if tonumber(ttl) < mark_s then
    redis.call('SET', KEYS[3], 'over ' .. terminal, 'EX', mark_s)
  else
    redis.call('EXPIRE', KEYS[3], ttl)
  end
end
local begin = fields_end + 2 + top - first
for i = begin + 1, #ARGV do
  redis.call('XADD', KEYS[2], string.format('%d-0', first + i - fields_end - 1), 'e', ARGV[i])
end
if top == 0 then redis.call('EXPIRE', KEYS[2], ttl) end
local news = begin == #ARGV and ARGV[begin] or table.concat(ARGV, '\n', begin)
local receivers = redis.call(ARGV[6], KEYS[4], news)
return {cancelling and 'CANCELLING' or 'OK', through, receivers}
