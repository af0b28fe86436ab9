-- view answers {incarnation, born, revision, full, member, revision, record, …}: all
-- records that changed after the caller's revision; a deleted one has the record ''.
-- full is 1 when it is everything there is and the caller must forget what it had.
local knownIncarnation, known = ARGV[3], tonumber(ARGV[4])
local m = redis.call('HMGET', meta, 'incarnation', 'born', 'rev', 'floor')
local full = m[1] ~= knownIncarnation or known < tonumber(m[4]) or known > tonumber(m[3])
local out = {m[1], m[2], m[3], full and 1 or 0}
if not full and known == tonumber(m[3]) then return out end
local after = full and '-inf' or '(' .. ARGV[4]
local changed = redis.call('ZRANGEBYSCORE', changes, after, '+inf', 'WITHSCORES')
for i = 1, #changed, 2 do
	local kind, id = string.sub(changed[i], 1, 1), string.sub(changed[i], 2)
	local record = redis.call('HGET', hashes[kind], id)
	if record or not full then
		out[#out + 1] = changed[i]
		out[#out + 1] = changed[i + 1]
		out[#out + 1] = record or ''
	end
end
return out
