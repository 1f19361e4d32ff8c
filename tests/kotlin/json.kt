// org.json as Android has it, as far as the examples go: a reader of JSON into maps and lists.
package org.json

class JSONArray(private val items: List<Any?>) {
    fun length(): Int = items.size
    fun getLong(index: Int): Long = (items[index] as Number).toLong()
    fun getDouble(index: Int): Double = (items[index] as Number).toDouble()
    fun getJSONObject(index: Int): JSONObject = JSONObject(items[index] as Map<*, *>)
}

class JSONObject(private val fields: Map<*, *>) {
    constructor(text: String) : this(Reader(text).value() as Map<*, *>)

    fun isNull(name: String): Boolean = fields[name] == null
    fun getString(name: String): String = fields.getValue(name) as String
    fun getInt(name: String): Int = (fields.getValue(name) as Number).toInt()
    fun getDouble(name: String): Double = (fields.getValue(name) as Number).toDouble()
    fun getJSONArray(name: String): JSONArray = JSONArray(fields.getValue(name) as List<Any?>)
}

private fun Map<*, *>.getValue(name: String): Any? = if (containsKey(name)) get(name) else throw NoSuchElementException(name)

private class Reader(private val text: String) {
    private var at = 0

    private fun skip(): Char {
        while (text[at].isWhitespace()) at++
        return text[at]
    }

    fun value(): Any? = when (skip()) {
        '{' -> items('}') { val key = string(); skip(); at++; key to value() }.toMap()
        '[' -> items(']') { value() }
        '"' -> string()
        else -> word()
    }

    private fun <T> items(end: Char, item: () -> T): List<T> {
        val found = mutableListOf<T>()
        at++
        while (skip() != end) {
            if (text[at] == ',') { at++; skip() }
            found.add(item())
        }
        at++
        return found
    }

    private fun string(): String {
        val built = StringBuilder()
        at++
        while (text[at] != '"') {
            if (text[at] == '\\') at++
            built.append(text[at++])
        }
        at++
        return built.toString()
    }

    private fun word(): Any? {
        val start = at
        while (at < text.length && text[at] !in ",]}" && !text[at].isWhitespace()) at++
        val found = text.substring(start, at)
        return when (found) { "null" -> null; "true" -> true; "false" -> false; else -> found.toDouble() }
    }
}
