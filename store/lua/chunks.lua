-- chunks takes a node's word on an image that it pulls: what it has, what it fetches,
-- what it wishes. Answers {'', nodes that pull, number of grants, the granted pieces…,
-- and for each node that has something for it: its name, 1 if it has left, its bits}.
local joined = KEYS[23] -- sorted set: the swarms in which this node pulls → its last word in ms
local who, have, serves, ready, leaves = take(), take(), take() == '1', take() == '1', take() == '1'
local life, stand, silence, stay = tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())
local open, maxNodes, maxSwarms, maxJoined = tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())
local maxPeers, draw = tonumber(take()), tonumber(take())
-- None of these pieces it has. Of those to look for the first are wished, and of these the
-- first insisted on.
local fetching, insisted, wished, look = list(), tonumber(take()), tonumber(take()), list()

local known = redis.call('ZSCORE', pullers, who)
if leaves and not known then return {'', 0, 0} end
if not redis.call('ZSCORE', joined, swarm) then
	redis.call('ZREMRANGEBYSCORE', joined, '-inf', whole(now - silence))
	if redis.call('ZCARD', joined) >= maxJoined then return {'full', 'images are pulled by this node'} end
end
if not redis.call('ZSCORE', swarms, swarm) then
	if redis.call('ZCARD', swarms) >= maxSwarms then return {'oldest', redis.call('ZRANGE', swarms, '0', '0')[1]} end
	redis.call('HSET', claims, 'since', whole(now))
end
if not known then
	if redis.call('ZCARD', pullers) >= maxNodes then return {'full', 'nodes pull this image'} end
	redis.call('ZREMRANGEBYSCORE', claimants, '-inf', whole(now))
	redis.call('ZREMRANGEBYSCORE', askers, '-inf', whole(now - silence))
end

redis.call('ZADD', swarms, whole(now), swarm)
redis.call('ZADD', askers, whole(now), who)
hold(who, serves and have or '')
-- Who has been silent is no peer; its bits go as far as there is work left.
for _, node in ipairs(redis.call('ZRANGEBYSCORE', pullers, '-inf', whole(now - silence), 'LIMIT', '0', '8')) do
	if work > 0 and node ~= who then forget(node) end
end

local mine = kept(who)
if leaves then
	for p in pairs(mine) do redis.call('HDEL', claims, 'c' .. p) end
	claim(who, {})
	redis.call('ZREM', joined, swarm)
	-- It is asked for what it has as long as it reports the image; see drop.lua.
	if serves and have ~= '' then redis.call('ZADD', pullers, whole(now + stay), who) else forget(who) end
	if redis.call('ZCARD', pullers) == 0 then sink() end
	return {'', 0, 0}
end
redis.call('ZADD', pullers, whole(now), who)
redis.call('ZADD', joined, whole(now), swarm)
redis.call('PEXPIRE', joined, whole(silence))
local pulling = redis.call('ZCOUNT', pullers, whole(now - silence), whole(now))
local limit = math.max(1, math.floor(open / pulling)) -- what it may have open

local function batch(key, prefix, of, to)
	if to == 0 then return {} end
	local fields = {}
	for i = 1, to do fields[i] = prefix .. of[i] end
	return redis.call('HMGET', key, unpack(fields))
end

-- Its claims: done with what it has, renewed while bytes move. What it fetches without a
-- claim it takes up if nobody has or fetches that: within its part, and just after the
-- store was emptied, when the others are not all known again, as far as all may.
local count = 0
for p in pairs(mine) do
	if bit(have, tonumber(p)) then
		redis.call('HDEL', claims, 'c' .. p)
		mine[p] = nil
	else
		count = count + 1
	end
end
local young = #fetching > 0 and now - tonumber(redis.call('HGET', claims, 'since') or 0) < life
local taken, got = batch(claims, 'c', fetching, #fetching), batch(holders, 'h', fetching, #fetching)
for i, p in ipairs(fetching) do
	if mine[p] then
		mine[p].deadline = now + life
	elseif count < (young and open or limit) and not claimed(taken[i]) and (not got[i] or got[i] == who) then
		mine[p] = {deadline = now + life, since = now, turn = 0}
		count = count + 1
	end
end

local held = batch(holders, 'h', look, #look)

-- Grants, in its order: of what nobody has and nobody else fetches, so that all nodes
-- together fetch `open` pieces at a time, and each of them one at least. A claim that it
-- has already is granted again: the answer was lost. If somebody has the piece meanwhile
-- it is given up instead.
local granted, old = {}, {}
taken = count < limit and batch(claims, 'c', look, wished) or {}
for i = 1, wished do
	local p = look[i]
	local elsewhere = i > insisted and (ready or held[i] and held[i] ~= who)
	if mine[p] and elsewhere then
		redis.call('HDEL', claims, 'c' .. p)
		mine[p] = nil -- its place is filled at the next word
	elseif not mine[p] and count < limit and not elsewhere then
		local c = claimed(taken[i])
		if not c then
			mine[p], count = {since = now, turn = 0}, count + 1
		elseif now - c.since >= stand * 2 ^ c.turn then
			old[#old + 1] = {p, c.turn + 1}
		end
	end
	if mine[p] then
		mine[p].deadline = now + life
		granted[#granted + 1] = p
	end
end
-- If nothing else is left for it, it is granted what somebody has had for long: that may be
-- lost with a node that is slow or stuck. Both may fetch it. Each that gets it so may have
-- it for twice as long as the one before, so that a slow line is not filled with repeats.
for _, o in ipairs(old) do
	if count >= limit then break end
	count = count + 1
	mine[o[1]] = {deadline = now + life, since = now, turn = o[2]}
	granted[#granted + 1] = o[1]
end
claim(who, mine)

-- Nodes that have what it has not, those of the rarest pieces first.
local rings, longest = {}, 0
for i = 1, #look do
	if held[i] then
		local _, spaces = string.gsub(held[i], ' ', ' ')
		rings[spaces + 1] = rings[spaces + 1] or {}
		table.insert(rings[spaces + 1], held[i])
		longest = math.max(longest, spaces + 1)
	end
end
local peers, chosen = {}, {[who] = true}
for turn = 0, longest - 1 do
	for size = turn + 1, longest do
		for _, nodes in ipairs(rings[size] or {}) do
			if #peers >= maxPeers then break end
			local node = ring(nodes)[(draw + turn) % size + 1]
			if not chosen[node] then
				chosen[node] = true
				peers[#peers + 1] = node
			end
		end
	end
end

local answer = {'', pulling, #granted}
for _, p in ipairs(granted) do answer[#answer + 1] = p end
if #peers > 0 then
	local seen, fields = redis.call('ZMSCORE', pullers, unpack(peers)), {}
	for i, node in ipairs(peers) do fields[i] = 'n' .. node end
	local bits = redis.call('HMGET', holders, unpack(fields))
	for i, node in ipairs(peers) do
		if seen[i] and bits[i] and tonumber(seen[i]) > now - silence then
			answer[#answer + 1] = node
			answer[#answer + 1] = tonumber(seen[i]) > now and 1 or 0
			answer[#answer + 1] = bits[i]
		end
	end
end
return answer
