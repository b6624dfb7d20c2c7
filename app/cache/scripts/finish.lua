-- Writes what came of a call, unless the key was taken over meanwhile.
--
-- KEYS[1]  the record, as in begin.lua
-- ARGV     token, body, ms to keep it; an empty body gives the key back instead
-- Returns  1 if it was done, 0 if the record is not this token's or has its outcome already

local found = redis.call('HMGET', KEYS[1], 'token', 'body')
if found[1] ~= ARGV[1] or found[2] then
  return 0
end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'body', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return 1
