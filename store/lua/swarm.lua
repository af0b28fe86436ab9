-- swarm is what the scripts about one image at one site share. Besides the keys of every
-- script they get those of the image at that site.
local swarms, claimants, askers = KEYS[17], KEYS[18], KEYS[19]
local pullers = KEYS[20] -- sorted set: node → its last word in ms; in the future for one that has left
-- hash: c<piece> → "deadline since turn node"; n<node> → its pieces, "3 7 9"; since → ms of the first word
local claims = KEYS[21]
local holders = KEYS[22] -- hash: n<node> → a bit for each piece it has; h<piece> → nodes that have it, newest first

-- work is how many bits of pieces one call notes at most, so that none takes long: about 5 ms
-- for these. What is left over is noted by the calls that come next.
local work = 1000

local at = 2
local function take() at = at + 1; return ARGV[at] end
local function list()
	local l = {}
	for i = 1, tonumber(take()) do l[i] = take() end
	return l
end

local swarm, most = take(), tonumber(take()) -- its name; how many holders of a piece are noted

-- bit tells whether piece p (from 0) is in a string of bits, the lowest of a byte first.
local function bit(bits, p)
	local byte = string.byte(bits, math.floor(p / 8) + 1)
	return byte ~= nil and math.floor(byte / 2 ^ (p % 8)) % 2 == 1
end

-- ring reads the nodes noted for a piece, without one of them.
local function ring(text, without)
	local nodes = {}
	for node in string.gmatch(text or '', '%S+') do
		if node ~= without then nodes[#nodes + 1] = node end
	end
	return nodes
end

-- note writes down that a node has pieces, or has them no more (has: piece → boolean).
local function note(node, pieces, has)
	local known = {[true] = {}, [false] = {}} -- many pieces are noted for the same nodes
	local function change(text, gained)
		if not known[gained][text] then
			local nodes = ring(text, node)
			if gained then table.insert(nodes, 1, node) end
			nodes[most + 1] = nil
			known[gained][text] = table.concat(nodes, ' ')
		end
		return known[gained][text]
	end
	for first = 1, #pieces, 200 do
		local fields, set, gone = {}, {}, {}
		for i = first, math.min(first + 199, #pieces) do fields[#fields + 1] = 'h' .. pieces[i] end
		local noted = redis.call('HMGET', holders, unpack(fields))
		for i, field in ipairs(fields) do
			local text = change(noted[i] or '', has[pieces[first + i - 1]])
			if text == '' then
				gone[#gone + 1] = field
			else
				set[#set + 1] = field
				set[#set + 1] = text
			end
		end
		if set[1] then redis.call('HSET', holders, unpack(set)) end
		if gone[1] then redis.call('HDEL', holders, unpack(gone)) end
	end
end

-- hold replaces a node's bits and notes what differs, as far as there is work for it: the
-- bits that it keeps are those that are noted. It answers whether that is all.
local function hold(node, bits)
	local before = redis.call('HGET', holders, 'n' .. node) or ''
	if before == bits then return true end
	local byte, last, pieces, has = 1, math.max(#before, #bits), {}, {}
	while byte <= last and work > 0 do
		if string.byte(before, byte) ~= string.byte(bits, byte) then
			for p = 8 * byte - 8, 8 * byte - 1 do
				local there = bit(bits, p)
				if bit(before, p) ~= there then
					pieces[#pieces + 1] = whole(p)
					has[whole(p)], work = there, work - 1
				end
			end
		end
		byte = byte + 1
	end
	note(node, pieces, has)
	local all = byte > last
	if not all then
		bits = string.sub(bits, 1, byte - 1) .. string.rep('\0', byte - 1 - #bits) .. string.sub(before, byte)
	end
	if bits == '' then
		redis.call('HDEL', holders, 'n' .. node)
	else
		redis.call('HSET', holders, 'n' .. node, bits)
	end
	return all
end

-- claimed answers a claim that holds, nil if there is none: until when, since when, how
-- many nodes had it before, and whose it is.
local function claimed(text)
	if not text then return end
	local deadline, since, turn, node = string.match(text, '^(%d+) (%d+) (%d+) (.*)$')
	if deadline and tonumber(deadline) > now then
		return {deadline = tonumber(deadline), since = tonumber(since), turn = tonumber(turn), node = node}
	end
end

-- claim writes a node's claims down: pieces → claim.
local function claim(node, pieces)
	local mine, last, set = {}, 0, {}
	for p, c in pairs(pieces) do
		set[#set + 1] = 'c' .. p
		set[#set + 1] = table.concat({whole(c.deadline), whole(c.since), whole(c.turn), node}, ' ')
		mine[#mine + 1], last = p, math.max(last, c.deadline)
	end
	if last == 0 then
		redis.call('HDEL', claims, 'n' .. node)
		redis.call('ZREM', claimants, swarm .. ' ' .. node)
	else
		redis.call('HSET', claims, 'n' .. node, table.concat(mine, ' '), unpack(set))
		redis.call('ZADD', claimants, whole(last), swarm .. ' ' .. node)
	end
end

-- kept answers a node's claims that hold, piece → claim, and drops its others.
local function kept(node)
	local mine = {}
	for p in string.gmatch(redis.call('HGET', claims, 'n' .. node) or '', '%S+') do
		local text = redis.call('HGET', claims, 'c' .. p)
		local c = claimed(text)
		if c and c.node == node then
			mine[p] = c
		elseif text and not c then
			redis.call('HDEL', claims, 'c' .. p)
		end
	end
	return mine
end

-- forget drops all that is known of a node. What there is no work for is left to the next
-- call that forgets it.
local function forget(node)
	local all = hold(node, '')
	for p in pairs(kept(node)) do redis.call('HDEL', claims, 'c' .. p) end
	claim(node, {})
	if all then redis.call('ZREM', pullers, node) end
end

-- sink deletes what is kept of the image at the site.
local function sink()
	redis.call('DEL', pullers, claims, holders)
	redis.call('ZREM', swarms, swarm)
end
