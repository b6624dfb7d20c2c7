-- Decides a list of asks against their counters, one after the other, each of them all or nothing.
--
-- KEYS        one for each counter of each ask, in their order; the same one as often as it is asked. All under the
--             hash tag {limits}
-- ARGV[1]     JSON: [wants, asks, order]
--   want      [op, kind, amount, window_us, window_rem, x, y, token, shadow, kind, ...]: eight for each counter of an
--             ask; op 0 spends, 1 gives back. All callers of a policy want the same
--             kind    0 is a rate (GCRA), 1 a daily, 2 a monthly quota
--             x, y    rate: what the ask costs in time, microseconds and parts of 1/amount of one; quota: the cost, 0
--             token   give back: when it was spent (rate) or in which period (quota)
--             shadow  true: told, not enforced
--   asks      the want of each, counted from 1
--   order     which ask is next, counted from 1: the calls of one caller ask the same
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
local wants, asks, order = request[1], request[2], request[3]

-- Where things stand in a counter's part of a want.
local KIND, AMOUNT, WINDOW_US, WINDOW_REM, X, Y, TOKEN, SHADOW, PART = 0, 1, 2, 3, 4, 5, 6, 7, 8

-- Asks that name the same key mean one counter. Where their windows differ, since one costs more or came after the load
-- had changed, the wider one holds for all.
local keys, by, from, place, window_us, window_rem = {}, {}, {}, {}, {}, {}
local begins, counters = {}, {} -- of an ask: how many counters are before its own
local n, distinct = 0, 0
for ask, number in ipairs(asks) do
  local want = wants[number]
  begins[ask] = n
  for at = 2, #want, PART do
    n = n + 1
    local key = KEYS[n]
    local i = place[key]
    local us, rem = want[at + WINDOW_US], want[at + WINDOW_REM]
    if not i then
      distinct = distinct + 1
      i = distinct
      keys[i], place[key], by[i], from[i] = key, i, want, at
      window_us[i], window_rem[i] = us, rem
    elseif us > window_us[i] or (us == window_us[i] and rem > window_rem[i]) then
      by[i], from[i], window_us[i], window_rem[i] = want, at, us, rem
    end
    counters[n] = i
  end
end

local stored = #keys > 0 and redis.call('MGET', unpack(keys)) or {}
local a, b, changed, set_back = {}, {}, {}, {}

for i, want in ipairs(by) do
  local value, at = stored[i], from[i]
  local kind = want[at + KIND]
  if kind == 0 then
    if value then
      local amount
      a[i], b[i], amount = struct.unpack('<ddd', value)
      if amount ~= want[at + AMOUNT] then -- the policy has changed: its parts of a microsecond are other ones
        a[i], b[i] = a[i] + 1, 0
      end
      local far = now + window_us[i] + 1
      if a[i] > far then -- the clock was set back: what was spent is spent, and no more than all of it
        a[i], b[i] = far - 1, window_rem[i]
        set_back[i] = true
      end
    else
      a[i], b[i] = 0, 0
    end
    if a[i] < now then
      a[i], b[i] = now, 0
    end
  else
    local period = kind == 1 and today or month_now
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

local function refuses(i, want, at)
  local x, y = want[at + X], want[at + Y]
  if x == 0 and y == 0 then
    return false
  end
  if set_back[i] then -- written even when it refuses: from here on its time passes again
    changed[i] = true
  end
  local amount = want[at + AMOUNT]
  if want[at + KIND] ~= 0 then
    return b[i] + x > amount
  end
  local us, rem = a[i] + x - window_us[i], b[i] + y - window_rem[i]
  if rem < 0 then
    us, rem = us - 1, rem + amount
  elseif rem >= amount then
    us, rem = us + 1, rem - amount
  end
  return us > now or (us == now and rem > 0)
end

local function spend(i, want, at)
  local x, y = want[at + X], want[at + Y]
  if x == 0 and y == 0 then
    return
  end
  changed[i] = true
  if want[at + KIND] ~= 0 then
    b[i] = b[i] + x
    return
  end
  local amount = want[at + AMOUNT]
  a[i], b[i] = a[i] + x, b[i] + y
  if b[i] >= amount then
    a[i], b[i] = a[i] + 1, b[i] - amount
  end
end

-- Time that has passed since has given a part back already: only the rest may be, or calls would be let in twice.
local function give_back(i, want, at)
  local x, y, token = want[at + X], want[at + Y], want[at + TOKEN]
  if set_back[i] then
    changed[i] = true
  end
  if want[at + KIND] ~= 0 then
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
      a[i], b[i] = a[i] - 1, b[i] + want[at + AMOUNT]
    end
    if a[i] < now then
      a[i], b[i] = now, 0
    end
    changed[i] = true
  end
end

local reply, last = {now}, 1
for _, ask in ipairs(order) do
  local want, of = wants[asks[ask]], begins[ask]
  if want[1] == 1 then
    for at = 2, #want, PART do
      of = of + 1
      give_back(counters[of], want, at)
    end
  else
    local slot, pass = last, true
    for at = 2, #want, PART do
      of = of + 1
      local status = 0
      if refuses(counters[of], want, at) then
        if want[at + SHADOW] then
          status = 2
        else
          status, pass = 1, false
        end
      end
      reply[last + 1] = status
      last = last + 3
    end
    of = begins[ask]
    for at = 2, #want, PART do
      of = of + 1
      local i = counters[of]
      if pass and reply[slot + 1] == 0 then
        spend(i, want, at)
      end
      reply[slot + 2], reply[slot + 3] = a[i], b[i]
      slot = slot + 3
    end
  end
end

for i, want in ipairs(by) do
  if changed[i] then
    local kind, amount = want[from[i] + KIND], want[from[i] + AMOUNT]
    if kind == 0 then
      local left_ms = math.ceil((a[i] - now) / 1000) + RATE_MARGIN_MS
      redis.call('SET', keys[i], struct.pack('<ddd', a[i], b[i], amount), 'PX', left_ms)
    else
      local ends = kind == 1 and a[i] + 1 or first_day(a[i] + 1)
      local left_ms = (ends * 86400 - seconds) * 1000 + PERIOD_MARGIN_MS
      redis.call('SET', keys[i], struct.pack('<dd', a[i], b[i]), 'PX', left_ms)
    end
  end
end

return reply
