-- swarm is what the scripts about one image at one site share. Besides the keys of every
-- script they get those of the image at that site.
local swarms, claimants = KEYS[17], KEYS[18]
local pullers = KEYS[19] -- sorted set: node → its last word in ms; in the future for one that has left
local claims = KEYS[20]  -- hash: c<piece> → "deadline node"; n<node> → its pieces, "3 7 9"
local holders = KEYS[21] -- hash: n<node> → a bit for each piece it has; h<piece> → nodes that have it, newest first

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

-- note writes down that a node has a piece, or has it no more.
local function note(p, node, has)
	local nodes = ring(redis.call('HGET', holders, 'h' .. p), node)
	if has then table.insert(nodes, 1, node) end
	nodes[most + 1] = nil
	if nodes[1] then
		redis.call('HSET', holders, 'h' .. p, table.concat(nodes, ' '))
	else
		redis.call('HDEL', holders, 'h' .. p)
	end
end

-- hold replaces a node's bits and notes what differs.
local function hold(node, bits)
	local before = redis.call('HGET', holders, 'n' .. node) or ''
	if before == bits then return end
	for byte = 1, math.max(#before, #bits) do
		if string.byte(before, byte) ~= string.byte(bits, byte) then
			for p = 8 * byte - 8, 8 * byte - 1 do
				local had, has = bit(before, p), bit(bits, p)
				if had ~= has then note(whole(p), node, has) end
			end
		end
	end
	if bits == '' then
		redis.call('HDEL', holders, 'n' .. node)
	else
		redis.call('HSET', holders, 'n' .. node, bits)
	end
end

-- claimed answers the deadline and the node of a claim that holds, nil if there is none.
local function claimed(text)
	if not text then return end
	local deadline, node = string.match(text, '^(%d+) (.*)$')
	if tonumber(deadline) > now then return tonumber(deadline), node end
end

-- claim writes a node's claims down: pieces → deadline.
local function claim(node, pieces)
	local mine, last = {}, 0
	for p, deadline in pairs(pieces) do
		redis.call('HSET', claims, 'c' .. p, whole(deadline) .. ' ' .. node)
		mine[#mine + 1], last = p, math.max(last, deadline)
	end
	if last == 0 then
		redis.call('HDEL', claims, 'n' .. node)
		redis.call('ZREM', claimants, swarm .. ' ' .. node)
	else
		redis.call('HSET', claims, 'n' .. node, table.concat(mine, ' '))
		redis.call('ZADD', claimants, whole(last), swarm .. ' ' .. node)
	end
end

-- kept answers a node's claims that hold, piece → deadline, and drops its others.
local function kept(node)
	local mine = {}
	for p in string.gmatch(redis.call('HGET', claims, 'n' .. node) or '', '%S+') do
		local text = redis.call('HGET', claims, 'c' .. p)
		local deadline, holder = claimed(text)
		if holder == node then
			mine[p] = deadline
		elseif text and not holder then
			redis.call('HDEL', claims, 'c' .. p)
		end
	end
	return mine
end

-- forget drops all that is known of a node.
local function forget(node)
	hold(node, '')
	for p in pairs(kept(node)) do redis.call('HDEL', claims, 'c' .. p) end
	claim(node, {})
	redis.call('ZREM', pullers, node)
end
