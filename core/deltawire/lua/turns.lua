-- Keeps and takes back a tenant's places, and gives those that are free to the jobs whose turn it is.
-- KEYS   1 running, 2 waiting
-- ARGV   1 ttl_s, 2 how long a kept place lasts in ms, 3 how many places there are (0: any number),
--        4 how many jobs may be called, 5 how long their places last in ms: until their messages are sent,
--        6 how many of the following have left, then those, then the jobs that keep their places
-- REPLY  {the jobs that are called; they wait until `sent`, and are called again if their places have lapsed}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left_end = 6 + tonumber(ARGV[6])
-- EXPIRE comes first: at maxmemory a script that has begun to write may go on.
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[1])
for i = 7, left_end do
  redis.call('ZREM', KEYS[1], ARGV[i])
  redis.call('ZREM', KEYS[2], ARGV[i])
end
for i = left_end + 1, #ARGV do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local called, places, count = {}, tonumber(ARGV[3]), tonumber(ARGV[4])
if places > 0 then count = math.min(count, places - redis.call('ZCARD', KEYS[1])) end
local seen = 0
while #called < count and seen < 1000 do
  local some = redis.call('ZRANGE', KEYS[2], seen, seen + 15)
  if #some == 0 then break end
  seen = seen + #some
  for _, job in ipairs(some) do
    -- Those with a place were called by somebody who is about to send their messages.
    if #called < count and not redis.call('ZSCORE', KEYS[1], job) then
      redis.call('ZADD', KEYS[1], now + tonumber(ARGV[5]), job)
      called[#called + 1] = job
    end
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return called
