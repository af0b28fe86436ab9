-- waiting is what pend and unpend share: the sessions that no node has answered yet. A
-- record is its deadline in milliseconds, node and actor, a line each, and then JSON,
-- which is never opened here.
local function forget(id)
	if redis.call('HDEL', pending, id) == 0 then return end
	mark('s' .. id)
	redis.call('ZADD', gone, revision, 's' .. id)
end

-- waiting answers node and actor of every session that waits still, and forgets those
-- past their deadline: of a replica that ended before it could.
local function waiting()
	local found, all = {}, redis.call('HGETALL', pending)
	for i = 1, #all, 2 do
		local deadline, node, actor = string.match(all[i + 1], '^(%d+)\n([^\n]*)\n([^\n]*)\n')
		if not deadline or tonumber(deadline) <= now then
			forget(all[i])
		else
			found[all[i]] = {node = node, actor = actor}
		end
	end
	return found
end

