-- chunks takes a node's word on an image that it pulls: what it has, what it fetches,
-- what it wishes. Answers {'', nodes that pull, number of grants, the granted pieces…,
-- and for each node that has something for it: its name, 1 if it has left, its bits}.
local who, have, serves, ready, leaves = take(), take(), take() == '1', take() == '1', take() == '1'
local life, silence, stay = tonumber(take()), tonumber(take()), tonumber(take())
local open, maxNodes, maxSwarms, maxPeers, draw = tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())
-- None of these pieces it has. Of those to look for the first are wished, and of these the
-- first insisted on.
local fetching, insisted, wished, look = list(), tonumber(take()), tonumber(take()), list()

if not redis.call('ZSCORE', swarms, swarm) and redis.call('ZCARD', swarms) >= maxSwarms then
	return {'full', 'images are pulled at this moment'}
end
if not redis.call('ZSCORE', pullers, who) and redis.call('ZCARD', pullers) >= maxNodes then
	return {'full', 'nodes pull this image'}
end

-- Who has been silent is no peer; a few at a time, so that no call takes long.
for _, node in ipairs(redis.call('ZRANGEBYSCORE', pullers, '-inf', whole(now - silence), 'LIMIT', '0', '8')) do
	forget(node)
end
redis.call('ZREMRANGEBYSCORE', claimants, '-inf', whole(now))
redis.call('ZADD', swarms, whole(now), swarm)
hold(who, serves and have or '')

local mine = kept(who)
if leaves then
	for p in pairs(mine) do redis.call('HDEL', claims, 'c' .. p) end
	claim(who, {})
	-- It is asked for what it has as long as it reports the image; see drop.lua.
	if serves and have ~= '' then redis.call('ZADD', pullers, whole(now + stay), who) else forget(who) end
	return {'', 0, 0}
end
redis.call('ZADD', pullers, whole(now), who)
local pulling = redis.call('ZCOUNT', pullers, whole(now - silence), whole(now))

-- Its claims: done with what it has, renewed while bytes move, and taken up again when the
-- store was emptied meanwhile.
local count = 0
for p in pairs(mine) do
	if bit(have, tonumber(p)) then
		redis.call('HDEL', claims, 'c' .. p)
		mine[p] = nil
	else
		count = count + 1
	end
end
for _, p in ipairs(fetching) do
	if mine[p] then
		mine[p] = now + life
	elseif count < open and not claimed(redis.call('HGET', claims, 'c' .. p)) then
		mine[p] = now + life
		count = count + 1
	end
end

local function batch(key, prefix, to)
	if to == 0 then return {} end
	local fields = {}
	for i = 1, to do fields[i] = prefix .. look[i] end
	return redis.call('HMGET', key, unpack(fields))
end
local held = batch(holders, 'h', #look)

-- Grants, in its order: of what nobody has and nobody else fetches, so that all nodes
-- together fetch `open` pieces at a time, and each of them one at least. A claim that it
-- has already is granted again: the answer was lost. If somebody has the piece meanwhile
-- it is given up instead.
local limit, granted = math.max(1, math.floor(open / pulling)), {}
local taken = count < limit and batch(claims, 'c', wished) or {}
for i = 1, wished do
	local p = look[i]
	local elsewhere = i > insisted and (ready or held[i] and held[i] ~= who)
	if mine[p] and elsewhere then
		redis.call('HDEL', claims, 'c' .. p)
		mine[p] = nil -- its place is filled at the next word
	elseif not mine[p] and count < limit and not elsewhere and not claimed(taken[i]) then
		mine[p], count = now, count + 1
	end
	if mine[p] then
		mine[p] = now + life
		granted[#granted + 1] = p
	end
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
		if seen[i] and bits[i] then
			answer[#answer + 1] = node
			answer[#answer + 1] = tonumber(seen[i]) > now and 1 or 0
			answer[#answer + 1] = bits[i]
		end
	end
end
return answer
