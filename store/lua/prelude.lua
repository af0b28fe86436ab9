-- Every script begins with this. KEYS come in one fixed order, so that no script
-- invents a key's name (see keys in script.go).
local meta, jobs, vms, nodes, images, orders = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local tombs, changes, gone, events = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local sessions, units, held, cursors, ledger = KEYS[11], KEYS[12], KEYS[13], KEYS[14], KEYS[15]
local pending = KEYS[16] -- 17 and on: see swarm.lua
local hashes = {j = jobs, v = vms, n = nodes, i = images, o = orders, s = pending}

-- ARGV[1] names the incarnation that is made if none is found; ARGV[2] is the channel.
local channel = ARGV[2]

-- time: milliseconds since 1970, exact in a double until far beyond this software.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- whole prints a number without an exponent: tostring() would write 1.7e+15.
local function whole(n) return string.format('%.0f', n) end

-- A store without an incarnation was emptied (or lost the one key that orders the
-- others): it starts again from nothing. Revisions begin at the microseconds since
-- 1970, so that a revision of an earlier incarnation is never met again.
if not redis.call('HGET', meta, 'incarnation') then
	redis.call('DEL', jobs, vms, nodes, images, orders, tombs, changes, gone, events,
		sessions, units, held, cursors, pending)
	local first = whole(now * 1000 + tonumber(clock[2]) % 1000)
	redis.call('HSET', meta, 'incarnation', ARGV[1], 'born', whole(now), 'rev', first,
		'floor', '0', 'epoch', '0', 'leader', '', 'until', '0')
end

-- mark notes that a record changed: member is the record's kind and id, its score the
-- revision. All marks of one script share one revision, so a view sees all or none.
local revision
local function mark(member)
	if not revision then
		redis.call('HINCRBY', meta, 'rev', 1)
		revision = redis.call('HGET', meta, 'rev') -- as a string: no way through a float
	end
	redis.call('ZADD', changes, revision, member)
end

-- unfenced says why a term may not write, or nil if it may.
local function unfenced(incarnation, epoch)
	local m = redis.call('HMGET', meta, 'incarnation', 'epoch', 'until')
	if m[1] ~= incarnation then return 'the store was emptied since' end
	if m[2] ~= epoch then return 'another leader took over' end
	if tonumber(m[3]) <= now then return 'the lease ran out' end
end
