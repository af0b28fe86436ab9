-- commit checks everything first and then writes everything, or nothing at all. What
-- to write was decided in Go. Answers {} if written, else {kind of refusal, detail}.
local at = 2
local function take() at = at + 1; return ARGV[at] end

local keepEvents, keepGone = tonumber(take()), tonumber(take())
local message, quiet = take(), take() == '1'

-- Fences.
local fenced, incarnation, epoch = take() == '1', take(), take()
if fenced then
	local why = unfenced(incarnation, epoch)
	if why then return {'fenced', why} end
elseif incarnation ~= '' and redis.call('HGET', meta, 'incarnation') ~= incarnation then
	return {'fenced', 'the store was emptied since'}
end

-- A node's report: (session, sequence) must be newer. A line of sessions is the
-- current one, its last sequence, and those it superseded, newest first.
local node, session, sequence, line = take(), take(), take(), nil
if node ~= '' then
	local seen = {}
	for word in string.gmatch(redis.call('HGET', sessions, node) or '', '%S+') do seen[#seen + 1] = word end
	line = {session, sequence}
	if seen[1] == session then
		if tonumber(sequence) <= tonumber(seen[2]) then return {'stale', 'a later report was taken'} end
		for i = 3, #seen do line[i] = seen[i] end
	elseif seen[1] then
		for i = 3, #seen do
			if seen[i] == session then return {'stale', 'a newer session of the agent reported'} end
		end
		line[3] = seen[1]
		for i = 3, math.min(#seen, 9) do line[i + 1] = seen[i] end -- the last 8 are plenty
	end
end

-- Writes: kind, id, revision it was decided on ('' any, 0 new), the job whose unit of
-- demand it holds (VMs only, else ''), and the record.
local queued, puts = {}, {}
for i = 1, tonumber(take()) do queued[take()] = true end
for i = 1, tonumber(take()) do
	puts[i] = {kind = take(), id = take(), rev = take(), unit = take(), record = take()}
end
local taken = {}
for _, p in ipairs(puts) do
	local exists = redis.call('HEXISTS', hashes[p.kind], p.id) == 1
	if p.rev == '0' then
		if exists then return {'conflict', p.kind .. p.id} end
	elseif p.rev ~= '' then
		local score = redis.call('ZSCORE', changes, p.kind .. p.id)
		if not exists or tonumber(score) ~= tonumber(p.rev) then return {'conflict', p.kind .. p.id} end
	end
	if p.unit ~= '' and queued[p.unit] then
		local holder = redis.call('HGET', units, p.unit)
		if (holder and holder ~= p.id) or taken[p.unit] then return {'conflict', 'j' .. p.unit} end
		taken[p.unit] = true
	end
end
for id in pairs(queued) do
	local record = redis.call('HGET', jobs, id)
	if not record or string.match(record, '^[^|]*') ~= 'queued' then return {'conflict', 'j' .. id} end
end

-- All checks passed: from here on only writes.
if line then redis.call('HSET', sessions, node, table.concat(line, ' ')) end

local function release(vm, unless)
	local job = redis.call('HGET', held, vm)
	if not job or job == unless then return end
	if redis.call('HGET', units, job) == vm then redis.call('HDEL', units, job) end
	redis.call('HDEL', held, vm)
end

for _, p in ipairs(puts) do
	redis.call('HSET', hashes[p.kind], p.id, p.record)
	redis.call('ZREM', gone, p.kind .. p.id)
	mark(p.kind .. p.id)
	if p.kind == 'v' then
		release(p.id, p.unit)
		if p.unit ~= '' then
			redis.call('HSET', units, p.unit, p.id)
			redis.call('HSET', held, p.id, p.unit)
		end
	end
end

local function drop(kind, id)
	if redis.call('HDEL', hashes[kind], id) == 0 then return end
	mark(kind .. id)
	redis.call('ZADD', gone, revision, kind .. id)
	if kind == 'v' then release(id) end
end

for i = 1, tonumber(take()) do
	local kind, id = take(), take()
	drop(kind, id)
	if kind == 'n' then -- its orders are nobody's any more
		drop('o', id)
		redis.call('HDEL', sessions, id)
	end
end

-- Marks of deleted records are kept for mirrors that have not seen the deletion; the
-- oldest half goes when there are too many, and mirrors older than that reload.
if redis.call('ZCARD', gone) > keepGone then
	local old = redis.call('ZRANGE', gone, 0, math.floor(keepGone / 2))
	local floor = redis.call('ZSCORE', gone, old[#old])
	for _, member in ipairs(old) do redis.call('ZREM', changes, member) end
	redis.call('ZREMRANGEBYRANK', gone, 0, #old - 1)
	redis.call('HSET', meta, 'floor', whole(tonumber(floor)))
end

local count = tonumber(take())
for i = 1, count do redis.call('LPUSH', events, take()) end
if count > 0 then redis.call('LTRIM', events, 0, keepEvents - 1) end
if not quiet then redis.call('PUBLISH', channel, message) end
return {}
