-- Marks every kept result of a tool as forgotten.
--
-- KEYS[1]  a hash: of each tool its epoch, a number that is part of its results' keys
-- ARGV     tool id
-- Returns  the new epoch: Redis's clock in µs, or one more than before if that is larger. A plain count would begin
--          anew in a Redis that lost it, below what replicas remember, and they would forget nothing.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local before = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') or 0
local epoch = math.max(now, before + 1)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', epoch))
return epoch
