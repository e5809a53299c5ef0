-- Which critical errors has nobody resolved yet, newest first?
SELECT id, created_at, recorded_at, error_type, thread_id, error_message, occurrences, outcome, error_code
FROM system_errors
WHERE severity = 'critical' AND resolved_at IS NULL
ORDER BY created_at DESC, id DESC;
