-- merge joins one piece of news into a job's record. The table of statuses comes from
-- fleet.StatusRanks; fleet.MergeJob is the same join in Go, held to this by a fuzz test.
--
-- A record is a head line, status|gate|runner|seen|feed, and the rest of the job as
-- JSON, which is never opened here: news wins or loses as a whole.
local ranks, id, event, keep = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local news = {status = ARGV[7], gate = ARGV[8], runner = ARGV[9], seen = ARGV[10], feed = ARGV[11], body = ARGV[12]}

local function parse(record)
	local r = {}
	r.status, r.gate, r.runner, r.seen, r.feed, r.body =
		string.match(record, '^([^|]*)|([^|]*)|([^|]*)|([^|]*)|([^\n]*)\n(.*)$')
	return r
end

local function join(r)
	return table.concat({r.status, r.gate, r.runner, r.seen, r.feed}, '|') .. '\n' .. r.body
end

-- place is where a record stands: its rank, its flags and the gate it counts with.
local function place(r)
	local rank, flags = string.match(ranks, ' ' .. r.status .. '=(%d+)(%a*)')
	local gate = r.gate
	if gate == '0' and string.find(flags, 'l') then gate = '9223372036854775807' end
	return tonumber(rank), string.find(flags, 'g'), string.find(flags, 'f'), gate
end

-- later compares two gates as decimal strings: doubles would round them.
local function later(a, b) return #a > #b or (#a == #b and a > b) end

local function supersedes(known)
	local krank, kgated, kfinal, kgate = place(known)
	local nrank, ngated, _, ngate = place(news)
	if kfinal then return false end
	if kgated and ngated and kgate ~= ngate then return later(ngate, kgate) end
	return nrank > krank
end

local before = redis.call('HGET', jobs, id)
local was, after = '', nil
if not before then
	-- Late news of a job that ended long ago: its record is gone, its tombstone is not.
	if redis.call('ZSCORE', tombs, id) then return {'', '', 0, 1} end
	after = news
else
	local known = parse(before)
	was = known.status
	if supersedes(known) then
		after = news
		local _, gated = place(news)
		if not gated then after.gate = known.gate end
		after.seen, after.feed = known.seen, known.feed
		if after.runner == '' then after.runner = known.runner end
	else
		after = known
		if after.runner == '' then after.runner = news.runner end
	end
end

local record = join(after)
if record == before then return {was, was, 0, 0} end
redis.call('HSET', jobs, id, record)
mark('j' .. id)
local _, _, final = place(after)
if final then redis.call('ZADD', tombs, 'NX', whole(now), id) end
if was ~= after.status then
	redis.call('LPUSH', events, event)
	redis.call('LTRIM', events, 0, keep - 1)
end
redis.call('PUBLISH', channel, '')
return {was, after.status, 1, 0}
