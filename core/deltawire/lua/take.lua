-- Pops messages and books them as kombu books what is delivered: in one go, so that none is lost on its way.
-- KEYS   1 unacked: delivery tag -> [message, exchange, routing key], 2 unacked_index: delivery tags by time,
--        3... lists of messages, in the order in which they are to be emptied
-- ARGV   1 how many messages, 2 Unix time, by the worker's clock
-- REPLY  {which list (3 is 0), delivery tag, message, ... of the next one}; none if it is not as kombu writes them
local taken = {}
for i = 3, #KEYS do
  while #taken < 3 * ARGV[1] do
    local raw = redis.call('LINDEX', KEYS[i], -1)
    if not raw then break end
    local ok, message = pcall(cjson.decode, raw)
    local properties = ok and type(message) == 'table' and message.properties
    local delivery = type(properties) == 'table' and properties.delivery_info
    if type(delivery) ~= 'table' or type(properties.delivery_tag) ~= 'string' then return taken end
    -- RPOP comes first: at maxmemory a script that has begun to write may go on.
    redis.call('RPOP', KEYS[i])
    redis.call('ZADD', KEYS[2], ARGV[2], properties.delivery_tag)
    redis.call('HSET', KEYS[1], properties.delivery_tag,
      '[' .. raw .. ', ' .. cjson.encode(delivery.exchange) .. ', ' .. cjson.encode(delivery.routing_key) .. ']')
    taken[#taken + 1] = i - 3
    taken[#taken + 1] = properties.delivery_tag
    taken[#taken + 1] = raw
  end
end
return taken
