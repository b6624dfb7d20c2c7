-- Writes what came of a call, unless the key was taken over meanwhile. A record that is gone (keys flushed, a failover that
-- lost it) is made anew: the call has run.
--
-- KEYS[1]  the record, as in begin.lua
-- ARGV     token, fp, body, ms to keep it; an empty body gives the key back instead
-- Returns  1 if it was done, 0 if the record is not this token's or has its outcome already

local found = redis.call('HMGET', KEYS[1], 'token', 'body')
if found[1] and (found[1] ~= ARGV[1] or found[2]) then
  return 0
end
if ARGV[3] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'fp', ARGV[2], 'token', ARGV[1], 'body', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return 1
