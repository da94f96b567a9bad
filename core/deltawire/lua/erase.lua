-- Erases a job that has ended; one that has not is ended by the event at hand, for those who read it live.
-- KEYS   1 meta, 2 log, 3 cancel, 4 channel, 5 watched, 6 sent
-- ARGV   1 event that says `cancelled`, 2 its number, 3 PUBLISH or SPUBLISH, 4 how long the mark stays in s
-- REPLY  {'ERASED'} | {'MISSING'}: there is no record
--        | {'MOVED'}: the job has not ended, and the event's number is not the next one: nothing was erased
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return {'MISSING'} end
if status == 'queued' or status == 'in_progress' then
  local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  local top = last and tonumber(string.match(last[1], '^%d+')) or 0
  if tonumber(ARGV[2]) ~= top + 1 then return {'MOVED'} end
  status = 'cancelled'
  redis.call(ARGV[3], KEYS[4], ARGV[1])
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[5], KEYS[6])
-- What says that the job is over: no late message, nor its worker when it wakes, brings it back.
redis.call('SET', KEYS[3], 'over ' .. status, 'EX', ARGV[4])
return {'ERASED'}
