-- Not a script: a function for those that name it in scripts.py. Deletes a cancel key that another tenant left
-- before the job had a record, which is not for this job. Whether it did.
local function drop_foreign_tombstone(key, tenant)
  local ok, request = pcall(cjson.decode, redis.call('GET', key) or '')
  local is_foreign = ok and type(request) == 'table' and type(request.tenant) == 'string'
    and request.tenant ~= tenant
  if is_foreign then redis.call('DEL', key) end
  return is_foreign
end
