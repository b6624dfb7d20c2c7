-- Claims an idempotency key, or says what stands in the way.
--
-- KEYS[1]  the record, a hash:
--            fp     what must be equal: digest of tool and parameters
--            token  execution id of the call that runs or ran
--            lease  Redis's clock, ms: until then its process is believed to live
--            body   what came of it; absent while it runs
-- ARGV     fp, token, lease in ms, ms to keep the record, 1 if an ended lease may be taken over
-- Returns  {state, token, ms left of the lease, body}

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('HMGET', KEYS[1], 'fp', 'token', 'lease', 'body')

if found[1] then
  if found[1] ~= ARGV[1] then
    return {'other', found[2] or '', 0, ''}
  end
  if found[4] then
    return {'done', found[2] or '', 0, found[4]}
  end
  local left = (tonumber(found[3]) or 0) - now
  if left > 0 then
    return {'running', found[2] or '', left, ''}
  end
  if ARGV[5] ~= '1' then
    return {'unknown', found[2] or '', 0, ''}
  end
end

redis.call('HSET', KEYS[1], 'fp', ARGV[1], 'token', ARGV[2], 'lease', now + ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {'begun', ARGV[2], 0, ''}
