-- Decides a list of asks against their counters, one after the other, each of them all or nothing.
--
-- KEYS        one per counter, all under the hash tag {limits}
-- ARGV[1]     JSON: [counters, asks]
--   counter   [kind, amount, window_us, window_rem]: kind 0 is a rate (GCRA), 1 a daily, 2 a monthly quota
--   ask       [op, counter, x, y, token, shadow, counter, x, y, token, shadow, ...]; op 0 spends, 1 gives back
--             x, y    rate: what the ask costs in time, microseconds and parts of 1/amount of one; quota: the cost, 0
--             token   give back: when it was spent (rate) or in which period (quota)
--             shadow  true: told, not enforced
-- ARGV[2]     Unix microseconds to be believed instead of the server's clock; empty outside of tests
--
-- Value of a key, packed doubles:   rate   TAT in microseconds, parts of 1/amount of one, amount
--                                   quota  period (days since 1970, or months), used
-- Reply, a flat list of integers:   now_us, then for each ask that spends and each of its counters
--                                   status (0 passes, 1 refuses, 2 would refuse), a, b: the state afterwards
--
-- An ask that costs 0 is a question: nothing is written. Every number is a whole number below 2^53.

local PERIOD_MARGIN_MS = 60000
local RATE_MARGIN_MS = 1000

local now, seconds
if ARGV[2] ~= '' then
  now = tonumber(ARGV[2])
  seconds = math.floor(now / 1000000)
else
  local time = redis.call('TIME')
  seconds = tonumber(time[1])
  now = seconds * 1000000 + tonumber(time[2])
end
local today = math.floor(seconds / 86400)

-- Days since 1970-01-01 to the first day of a month, counted in months since 1970-01; years of the Gregorian calendar.
local function first_day(month)
  local year = 1970 + math.floor(month / 12)
  local shifted = month % 12 + 10 -- March is the first month of the shifted year, so that a leap day is its last
  if shifted >= 12 then
    shifted = shifted - 12
  else
    year = year - 1
  end
  local leaps = math.floor(year / 4) - math.floor(year / 100) + math.floor(year / 400)
  return year * 365 + leaps + math.floor((153 * shifted + 2) / 5) - 719468
end

local month_now = math.floor(today * 12 / 365.2425)
while first_day(month_now + 1) <= today do month_now = month_now + 1 end
while first_day(month_now) > today do month_now = month_now - 1 end

local request = cjson.decode(ARGV[1])
local counters, asks = request[1], request[2]
local stored = #KEYS > 0 and redis.call('MGET', unpack(KEYS)) or {}
local a, b, changed, set_back = {}, {}, {}, {}

for i, counter in ipairs(counters) do
  local value = stored[i]
  if counter[1] == 0 then
    if value then
      local amount
      a[i], b[i], amount = struct.unpack('<ddd', value)
      if amount ~= counter[2] then -- the policy has changed: its parts of a microsecond are other ones
        a[i], b[i] = a[i] + 1, 0
      end
      local far = now + counter[3] + 1
      if a[i] > far then -- the clock was set back: what was spent is spent, and no more than all of it
        a[i], b[i] = far - 1, counter[4]
        set_back[i] = true
      end
    else
      a[i], b[i] = 0, 0
    end
    if a[i] < now then
      a[i], b[i] = now, 0
    end
  else
    local period = counter[1] == 1 and today or month_now
    if value then
      a[i], b[i] = struct.unpack('<dd', value)
    else
      a[i], b[i] = period, 0
    end
    if a[i] > period + 1 then -- the clock was far ahead: its period may be years away
      a[i], b[i] = period, 0
      set_back[i] = true
    elseif a[i] < period then -- and never back to the one before, where a clock was set back a little
      a[i], b[i] = period, 0
    end
  end
end

local function refuses(i, counter, x, y)
  if x == 0 and y == 0 then
    return false
  end
  if set_back[i] then -- written even when it refuses: from here on its time passes again
    changed[i] = true
  end
  if counter[1] ~= 0 then
    return b[i] + x > counter[2]
  end
  local us, rem = a[i] + x - counter[3], b[i] + y - counter[4]
  if rem < 0 then
    us, rem = us - 1, rem + counter[2]
  elseif rem >= counter[2] then
    us, rem = us + 1, rem - counter[2]
  end
  return us > now or (us == now and rem > 0)
end

local function spend(i, counter, x, y)
  if x == 0 and y == 0 then
    return
  end
  changed[i] = true
  if counter[1] ~= 0 then
    b[i] = b[i] + x
    return
  end
  a[i], b[i] = a[i] + x, b[i] + y
  if b[i] >= counter[2] then
    a[i], b[i] = a[i] + 1, b[i] - counter[2]
  end
end

-- Time that has passed since has given a part back already: only the rest may be, or calls would be let in twice.
local function give_back(i, counter, x, y, token)
  if set_back[i] then
    changed[i] = true
  end
  if counter[1] ~= 0 then
    if a[i] == token then
      b[i] = math.max(0, b[i] - x)
      changed[i] = true
    end
    return
  end
  local us = x - math.max(0, now - token)
  if us > 0 or (us == 0 and y > 0) then
    a[i], b[i] = a[i] - us, b[i] - y
    if b[i] < 0 then
      a[i], b[i] = a[i] - 1, b[i] + counter[2]
    end
    if a[i] < now then
      a[i], b[i] = now, 0
    end
    changed[i] = true
  end
end

local reply = {now}
for _, ask in ipairs(asks) do
  if ask[1] == 1 then
    for at = 2, #ask, 5 do
      local i = ask[at]
      give_back(i, counters[i], ask[at + 1], ask[at + 2], ask[at + 3])
    end
  else
    local first, pass = #reply, true
    for at = 2, #ask, 5 do
      local i = ask[at]
      local status = 0
      if refuses(i, counters[i], ask[at + 1], ask[at + 2]) then
        if ask[at + 4] then
          status = 2
        else
          status, pass = 1, false
        end
      end
      reply[#reply + 1] = status
      reply[#reply + 1] = 0
      reply[#reply + 1] = 0
    end
    local slot = first + 1
    for at = 2, #ask, 5 do
      local i = ask[at]
      if pass and reply[slot] == 0 then
        spend(i, counters[i], ask[at + 1], ask[at + 2])
      end
      reply[slot + 1], reply[slot + 2] = a[i], b[i]
      slot = slot + 3
    end
  end
end

for i, counter in ipairs(counters) do
  if changed[i] then
    if counter[1] == 0 then
      local left_ms = math.ceil((a[i] - now) / 1000) + RATE_MARGIN_MS
      redis.call('SET', KEYS[i], struct.pack('<ddd', a[i], b[i], counter[2]), 'PX', left_ms)
    else
      local ends = counter[1] == 1 and a[i] + 1 or first_day(a[i] + 1)
      local left_ms = (ends * 86400 - seconds) * 1000 + PERIOD_MARGIN_MS
      redis.call('SET', KEYS[i], struct.pack('<dd', a[i], b[i]), 'PX', left_ms)
    end
  end
end

return reply
