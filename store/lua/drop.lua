-- drop forgets nodes that have left, as far as nothing was heard of them since.
for _, node in ipairs(list()) do
	local seen = redis.call('ZSCORE', pullers, node)
	if seen and tonumber(seen) > now then forget(node) end
end
return {}
